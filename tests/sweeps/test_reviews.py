"""A blind review: what a reviewer sees and what of it stays, and the page over real HTTP."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from browser import look_at, needs_browser

from cluster import files, paths
from sweeps import review_page, reviews
from sweeps.reviews import Sheet
from trainables.metrics import Answer, Answered, Scores


def scored(count: int = 12, winner: str = "good") -> dict[str, Scores]:
    def answers(text: str) -> Answered:
        return Answered("generation", [Answer(f"p{n}", "e", f"{text} {n}") for n in range(count)])

    said = {"base": "bad", "winner": winner, "few_shot": "so-so"}
    return {side: Scores({}, {"domain": answers(text)}) for side, text in said.items()}


@pytest.fixture(autouse=True)
def run_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    return "run"


def rated(sheet: Sheet) -> tuple[dict, str]:
    """A reviewer who knows what is good, and nothing else."""
    scores = {label: 5 if sheet.answers[label].startswith("good") else 2 for label in ("A", "B")}
    return scores, max(scores, key=scores.__getitem__)


def test_scores_go_to_whoever_gave_the_answer(run_id: str) -> None:
    for sheet in reviews.sheets(run_id, scored(), 10, seed=0):
        reviews.keep(run_id, sheet, *rated(sheet), "ada")
    assert reviews.summary(run_id, scored()) == {
        "reviews": 10,
        "reviewers": ["ada"],
        "scores": {"base": 2.0, "winner": 5.0},
        "better": {"base": 0, "winner": 10, "tie": 0},
    }


def test_sides_change_by_chance_and_sheets_say_nothing_of_them(run_id: str) -> None:
    sheets = [sheet for _ in range(5) for sheet in reviews.sheets(run_id, scored(), 12, seed=0)]
    sides = {sheet.whose["A"] for sheet in sheets}
    assert sides == {"base", "winner"}
    assert len({sheet.sheet_id for sheet in sheets}) == len(sheets)


def test_what_was_reviewed_is_not_asked_again_and_counts_only_while_the_answers_are_these(run_id: str) -> None:
    first, *rest = reviews.sheets(run_id, scored(), 4, seed=0)
    reviews.keep(run_id, first, {"A": 3, "B": 3}, "tie", "ada")
    assert [sheet.prompt for sheet in reviews.sheets(run_id, scored(), 4, seed=0)] == [sheet.prompt for sheet in rest]
    assert reviews.summary(run_id, scored(winner="another trial's")) is None
    assert reviews.summary(run_id, scored())["better"] == {"base": 0, "winner": 0, "tie": 1}  # type: ignore[index]
    assert reviews.summary(run_id, {}) is None


@pytest.mark.parametrize(
    ("scores", "better", "words"),
    [({"A": 0, "B": 3}, "A", "the score of A"), ({"A": 1, "B": 6}, "A", "got 6"), ({"A": 1, "B": 1}, "C", "'C'")],
)
def test_what_is_no_score_is_not_kept(run_id: str, scores: dict, better: str, words: str) -> None:
    (sheet,) = reviews.sheets(run_id, scored(), 1, seed=0)
    with pytest.raises(ValueError, match=words):
        reviews.keep(run_id, sheet, scores, better, "ada")
    assert not paths.review_file(run_id).exists()


class Page:
    """The page in a thread, as ``python -m sweeps review`` serves it."""

    def __init__(self, run_id: str, count: int) -> None:
        self.lines: list[str] = []
        self.said = threading.Event()
        self.sheets = reviews.sheets(run_id, scored(), count, seed=0)

        def keep(sheet: Sheet, scores: dict, better: str) -> None:
            reviews.keep(run_id, sheet, scores, better, "ada")

        def log(line: str) -> None:
            self.lines.append(line)
            self.said.set()

        self.thread = threading.Thread(target=review_page.serve, args=(self.sheets, keep, 0, log), daemon=True)
        self.thread.start()
        assert self.said.wait(30)
        self.url = re.search(r"http://\S+", self.lines[0]).group()  # type: ignore[union-attr]

    def get(self) -> str:
        with urllib.request.urlopen(self.url, timeout=30) as response:
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            return response.read().decode()

    def post(self, **form: object) -> str:
        body = urllib.parse.urlencode(form).encode()
        with urllib.request.urlopen(self.url, body, timeout=30) as response:
            return response.read().decode()


def test_the_page_goes_through_all_prompts_and_ends_the_server(run_id: str) -> None:
    page = Page(run_id, 3)
    seen = []
    for number in range(1, 4):
        shown = page.get()
        seen.append(shown)
        assert f"Prompt {number} of 3" in shown
        sheet = next(sheet for sheet in page.sheets if sheet.sheet_id in shown)
        scores, better = rated(sheet)
        after = page.post(sheet=sheet.sheet_id, better=better, **scores)
    assert "Done" in after
    page.thread.join(30)
    assert not page.thread.is_alive()
    assert reviews.summary(run_id, scored())["scores"] == {"base": 2.0, "winner": 5.0}  # type: ignore[index]
    assert not any(word in shown for shown in seen for word in ("winner", "base", "few_shot"))


def test_a_half_filled_form_and_a_sheet_that_was_sent_twice(run_id: str) -> None:
    page = Page(run_id, 2)
    first = next(sheet for sheet in page.sheets if sheet.sheet_id in page.get())
    with pytest.raises(urllib.error.HTTPError, match="400") as told:
        page.post(sheet=first.sheet_id, A=5)
    assert "must be from 1 to 5" in told.value.read().decode()
    for _ in range(2):
        page.post(sheet=first.sheet_id, A=5, B=1, better="A")
    assert len(files.read_json(paths.review_file(run_id))) == 1


def test_nobody_comes_in_without_the_address(run_id: str) -> None:
    page = Page(run_id, 1)
    host = page.url.rpartition("/")[0]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{host}/", timeout=30)
    elsewhere = urllib.request.Request(page.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(elsewhere, timeout=30)
    assert host.startswith("http://127.0.0.1:")


def test_what_a_model_says_is_text_on_the_page(run_id: str) -> None:
    (sheet,) = reviews.sheets(run_id, scored(1, winner="<script>alert(1)</script>"), 1, seed=0)
    page = review_page.pages.render("review", sheet=sheet, problem="", number=1, count=1)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_port_that_is_taken_is_one_line(run_id: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port: {port} cannot be listened on"):
            review_page.serve([], lambda *_: None, port, lambda _: None)


@needs_browser
def test_the_page_in_a_browser(run_id: str, tmp_path: Path) -> None:
    page = Page(run_id, 2)
    seen = look_at(page.url, tmp_path / "browser")
    assert seen.complaints == []
    assert seen.document.count('type="radio"') == 13
    assert "Keep and go on" in seen.document
