from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import files, paths, session


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "value.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(ValueError, match=r"nan|Out of range"):
        files.write_json(target, {"a": float("nan")})
    assert files.read_json(target) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["value.json"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half() -> None:
        with files.new_directory(tmp_path / "made") as unfinished:
            (unfinished / "file").write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        half()
    assert list(tmp_path.iterdir()) == []
    with files.new_directory(tmp_path / "made") as unfinished:
        (unfinished / "file").write_text("whole")
    assert (tmp_path / "made" / "file").read_text() == "whole"
    with pytest.raises(FileExistsError), files.new_directory(tmp_path / "made"):
        pass


def test_of_two_that_make_one_directory_at_once_the_second_is_told(tmp_path: Path) -> None:
    def second() -> None:
        with files.new_directory(tmp_path / "made") as late:
            with files.new_directory(tmp_path / "made") as early:
                (early / "file").write_text("first")
            (late / "file").write_text("second")

    with pytest.raises(FileExistsError, match="exists already"):
        second()
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a b", "-a", "x" * 64, "a\n"])
def test_names_that_would_leave_their_directory(name: str) -> None:
    with pytest.raises(ValueError, match="must be letters"):
        paths.check_name("name", name)


def test_home_in_a_path(home: Path) -> None:
    assert paths.expand("${WINNOW_HOME}/bases/tiny") == home / "bases" / "tiny"


def test_a_trial_that_no_cluster_of_this_size_can_hold() -> None:
    session.check_fits("a trial", {"CPU": 1, "GPU": 0.5}, {"CPU": 2, "GPU": 1}, "ask for less")
    with pytest.raises(ValueError, match="a trial wants 4 CPU but the cluster has 2; ask for less, or use a larger"):
        session.check_fits("a trial", {"CPU": 4}, {"CPU": 2}, "ask for less")


@pytest.mark.parametrize("name", ["rayservice", "raycluster"])
def test_manifests_are_yaml_of_the_pinned_ray(name: str) -> None:
    manifest = yaml.safe_load(Path(f"cluster/{name}.yaml").read_text())
    assert "2.60.0" in str(manifest)
