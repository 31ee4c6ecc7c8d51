"""Two versions of a model behind one endpoint: canary, promotion, rollback, keys, hostile clients, engines that die.

On the endpoint that the quickstart left up: these tests come right after its own, and the last one stops it.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import fake_judge
import openai
import psutil
import pytest
from conftest import ROOT, winnow

from serving import registry
from serving.traffic import Routes

ASKED = [{"role": "user", "content": "Repeat: lemon"}]
LONG = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def versions(quickstart) -> tuple[str, str]:
    """Production, and another version that answers as it does: the same weights beside one more file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(quickstart["home"]))
        first = registry.find("tickets")
        return first.version, copied(first, "tickets", "trained anew")


def copied(source: registry.ModelVersion, model: str, notes: str, **record: Any) -> str:
    """A version of ``model`` that answers as ``source`` does, with another ``record`` in parts."""
    with registry.staging(model) as staged:
        for file in source.path.iterdir():
            if file.name != "record.json":
                shutil.copyfile(file, staged / file.name)
        (staged / "NOTES.txt").write_text(notes)
        return registry.register(model, staged, source.record | record).version


@pytest.fixture(scope="module")
def client(quickstart) -> openai.OpenAI:
    return openai.OpenAI(base_url=quickstart["url"], api_key="unused", max_retries=0, timeout=120)


def serving(quickstart, *arguments: str) -> dict[str, Any]:
    done = winnow("serving", *arguments, "--json", env=quickstart["env"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(client: openai.OpenAI, user: str = "", model: str = "tickets", **more: Any) -> Any:
    wanted = {"max_tokens": 4, "temperature": 0} | more | ({"user": user} if user else {})
    return client.chat.completions.with_raw_response.create(model=model, messages=ASKED, **wanted)


def everywhere(ask: Callable[[], int], status: int, within_s: float = 10) -> None:
    """That it comes to this at both replicas of the ingress, soon: each of a dozen calls has its own connection."""
    deadline = time.monotonic() + within_s
    while (told := [ask() for _ in range(12)]) != [status] * 12:
        assert time.monotonic() < deadline, told


def version_of(reply: Any) -> str:
    return reply.headers["x-winnow-version"]


@contextmanager
def load(client: openai.OpenAI, clients: int = 4, pause_s: float = 0, **more: Any) -> Iterator[dict[str, list]]:
    """So many clients that ask again and again; half of them stream. What they saw is by when they asked for it."""
    seen: dict[str, list] = {"versions": [], "errors": []}
    over = Event()

    def go(streams: bool) -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                if streams:
                    pieces = list(client.chat.completions.create(model="tickets", messages=ASKED, stream=True, **more))
                    assert pieces[-1].choices[0].finish_reason
                else:
                    seen["versions"].append((began, version_of(ask(client, **more))))
            except Exception as error:  # a stream without its end too: nobody would see it in a thread
                seen["errors"].append((began, error))
                time.sleep(0.2)
            time.sleep(pause_s)

    threads = [Thread(target=go, args=(number % 2 == 1,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def post(url: str, body: Any, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, raw, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def test_what_vllm_compiles_at_its_first_use_is_there_before_the_first_user(quickstart, client) -> None:
    """Its sampler for one answer and for several at once, its log probabilities. The quickstart asks greedily."""

    def compiled() -> set[Path]:
        return {file for file in (quickstart["home"] / "compiled").rglob("*") if file.is_file()}

    before = compiled()
    assert [file for file in before if file.suffix == ".so"]
    asked = [{"temperature": 1, "logprobs": number % 2 == 1} | LONG for number in range(4)]
    for alone in asked[:2]:
        ask(client, **alone)
    with ThreadPoolExecutor(len(asked)) as pool:
        told = [*pool.map(lambda wanted: ask(client, **wanted), asked)]
    assert {reply.status_code for reply in told} == {200}
    assert compiled() == before


def test_a_canary_comes_up_beside_production_and_takes_its_share(quickstart, versions, client) -> None:
    """Though a sweep has made it production already, as every sweep does that is accepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(quickstart["home"]))
        registry.set_alias("tickets", "production", versions[1], "a sweep")
        with load(client, 2, pause_s=0.2) as seen:
            made = serving(quickstart, "canary", "tickets", versions[1], "--weight", "40")
        assert registry.aliases("tickets") == {"production": versions[0], "served": versions[0], "canary": versions[1]}
    assert seen["errors"] == []
    assert {version for at, version in seen["versions"] if at < seen["versions"][-1][0] - 5} == {versions[0]}
    assert (made["version"], made["weight"], made["automatic"]) == (versions[1], 40, False)
    time.sleep(0.5)
    users = [f"user-{number}" for number in range(60)]
    routes = Routes(versions, versions[0], {"production": versions[0], "canary": versions[1]}, 40)
    expected = {user: routes.choose("", user)[0] for user in users}
    for _ in range(2):
        assert {user: version_of(ask(client, user)) for user in users} == expected
    assert set(expected.values()) == set(versions)
    assert version_of(ask(client, model=f"tickets@{versions[1]}")) == versions[1]
    assert version_of(ask(client, model="tickets@production")) == versions[0]
    with pytest.raises(openai.NotFoundError, match="is not deployed"):
        ask(client, model="tickets@v0")


def test_what_each_variant_did_is_counted(quickstart, versions, client) -> None:
    time.sleep(1.5)  # ingress replicas report every second
    app = serving(quickstart, "status")["applications"]["tickets"]
    assert app["canary"]["weight"] == 40
    assert app["aliases"] == {"production": versions[0], "served": versions[0], "canary": versions[1]}
    counted = app["variants"]
    assert counted[f"{versions[1]} canary"]["requests"] >= 20
    assert counted[f"{versions[1]} canary"]["errors"] == 0
    assert counted[f"{versions[0]} production"]["completion_tokens"] > 60
    assert counted[f"{versions[1]} direct"]["requests"] == 1
    assert 0 < counted[f"{versions[0]} production"]["first_token_p50_s"] < 10


def test_a_version_that_vllm_would_refuse_does_not_end_the_canary_that_is_there(quickstart, versions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(quickstart["home"]))
        first, before = registry.find(f"tickets@{versions[0]}"), registry.canary("tickets")
        settings = first.record["serving"] | {"engine_kwargs": {"max_sequences": 8}}
        refused = copied(first, "tickets", "with settings of its own", serving=settings)
        done = winnow("serving", "canary", "tickets", refused, "--weight", "10", env=quickstart["env"])
        assert done.returncode == 2
        assert "serving.engine_kwargs.max_sequences: must be an argument of vLLM's engine" in done.stderr
        assert registry.aliases("tickets")["canary"] == versions[1]
        assert registry.canary("tickets") == before
        shutil.rmtree(registry.find(f"tickets@{refused}").path)


def test_prometheus_finds_all_that_the_dashboard_shows(quickstart, versions, client) -> None:
    dashboard = (ROOT / "cluster/grafana.json").read_text()
    shown = set(re.findall(r"\bray_(?:winnow|serve)_[a-z_]+?(?=_bucket\b|[{,])", dashboard))
    assert len(shown) == 8
    of_engine = re.compile(rf'^ray_vllm_request_success_total\{{.*deployment="{versions[1]}".* [1-9]', re.MULTILINE)
    url, deadline = serving(quickstart, "status")["metrics"], time.monotonic() + 30
    while time.monotonic() < deadline:  # Ray collects every few seconds
        scraped = urllib.request.urlopen(url, timeout=10).read().decode()
        if all(f"# TYPE {name} " in scraped for name in shown) and of_engine.search(scraped):
            break
        time.sleep(1)
    assert {name for name in shown if f"# TYPE {name} " not in scraped} == set()
    assert of_engine.search(scraped)
    line = next(
        one for one in scraped.splitlines() if one.startswith("ray_winnow_requests_total{") and versions[1] in one
    )
    assert all(label in line for label in ('model="tickets"', 'outcome="answered"', 'variant="'))


def test_promote_and_rollback_take_effect_within_a_second_and_lose_nothing(quickstart, versions, client) -> None:
    with load(client) as seen:
        for command, version in (
            (("promote", "tickets", versions[1]), versions[1]),
            (("rollback", "tickets"), versions[0]),
        ):
            assert serving(quickstart, *command)["version"] == version
            told = time.monotonic()
            time.sleep(3)
            late = {one for at, one in seen["versions"] if at > told + 1}
            assert late == {version}
    assert seen["errors"] == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(quickstart["home"]))
        assert registry.aliases("tickets") == {
            "production": versions[0],
            "served": versions[0],
            "previous": versions[1],
        }


def test_bad_feedback_rolls_an_automatic_canary_back(quickstart, versions, client) -> None:
    serving(quickstart, "canary", "tickets", versions[1], "--auto")
    time.sleep(0.5)
    routes = Routes(versions, versions[0], {"production": versions[0], "canary": versions[1]}, 5)
    users: dict[str, list[str]] = {"production": [], "canary": []}
    for number in range(2000):
        users[routes.choose("", f"user-{number}")[1]].append(f"user-{number}")
    url = f"{quickstart['url']}/feedback"
    scores = {}
    for variant, score in (("production", 1), ("canary", 0.2)):
        for user in users[variant][:21]:
            reply = ask(client, user)
            assert reply.headers["x-winnow-variant"] == variant
            scores[reply.parse().id] = score
    for identity, score in scores.items():
        assert post(url, {"id": identity, "score": score})[0] == 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_HOME", str(quickstart["home"]))
        deadline = time.monotonic() + 15
        while registry.canary("tickets") and time.monotonic() < deadline:  # the conductor looks every second
            time.sleep(0.2)
        assert registry.canary("tickets") is None
        assert registry.aliases("tickets")["production"] == versions[0]
        last = registry.history("tickets")[-1]
    assert last["reason"].startswith("roll back: mean feedback 0.2")
    time.sleep(1)
    assert {version_of(ask(client, user)) for user in users["canary"][:5]} == {versions[0]}
    assert post(url, {"id": "chatcmpl-unknown", "score": 1})[0] == 404
    assert post(url, {"id": "x", "score": 7})[0] == 400
    serving(quickstart, "deploy", "tickets")  # production alone is left
    with pytest.raises(openai.NotFoundError):
        ask(client, model=f"tickets@{versions[1]}")


BODY = {"model": "tickets", "messages": ASKED, "max_tokens": 4}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["yes", "no"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def formed(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "max_tokens": 48,
    }


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b"{"),
        (400, b"[" * 100_000),
        (400, b'{"model": "tickets", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        (413, b"x" * 2_000_000),
        (404, BODY | {"model": "unknown"}),
        (404, {"messages": ASKED}),
        (400, BODY | {"max_tokens": 10**9}),
        (400, BODY | {"max_tokens": -1}),
        (400, BODY | {"temperature": "hot"}),
        (400, BODY | {"n": 1000}),
        (400, BODY | {"chat_template": "{{ 1 }}"}),
        (400, BODY | {"messages": []}),
        (400, BODY | {"messages": [{"role": "user", "content": "lemon " * 5000}]}),
        (400, BODY | {"logit_bias": {"99999999": 1}}),
        (400, BODY | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (400, BODY | formed({"type": "nonsense"})),
        (400, BODY | {"structured_outputs": {"regex": "(("}}),
    ],
)
def test_a_hostile_request_gets_a_clean_error(quickstart, status: int, body: Any) -> None:
    found, answer, _ = post(f"{quickstart['url']}/chat/completions", body)
    assert found == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_refusals_take_no_threads_of_the_ingress(quickstart) -> None:
    def threads() -> int:
        return sum(one.num_threads() for one in _found(quickstart, "ServeReplica:tickets:ingress"))

    before = threads()
    assert before
    with ThreadPoolExecutor(32) as pool:
        told = list(
            pool.map(lambda _: post(f"{quickstart['url']}/chat/completions", BODY | {"model": "x"}), range(256))
        )
    assert {status for status, _, _ in told} == {404}
    assert threads() < before + 8


def test_structured_output_works_also_after_a_malformed_schema(quickstart) -> None:
    url = f"{quickstart['url']}/chat/completions"
    for _ in range(2):
        status, answer, _ = post(url, BODY | formed(SCHEMA))
        assert status == 200, answer
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("yes", "no")
        assert post(url, BODY | formed({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}))[0] == 400


def test_a_form_that_no_text_has_is_the_clients_mistake(quickstart, client) -> None:
    """Such an answer is empty, as those of a model that fails are: such requests would roll a canary back."""
    before = _counted(quickstart)
    for endless in (formed({"$ref": "#"}), {"structured_outputs": {"grammar": "root ::= root"}}):
        status, answer, _ = post(f"{quickstart['url']}/chat/completions", BODY | endless)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "")
    streamed = client.chat.completions.create(model="tickets", messages=ASKED, stream=True, **formed({"$ref": "#"}))
    assert not any(piece.choices[0].delta.content for piece in streamed)
    for mistaken in ({"logprobs": True, "top_logprobs": 21}, {"logit_bias": {"99999999": 1}}):
        with pytest.raises(openai.APIError):  # in the stream: its head was sent before vLLM looked
            list(client.chat.completions.create(model="tickets", messages=ASKED, stream=True, **mistaken))
    time.sleep(1.5)
    after = _counted(quickstart)
    assert after["rejected"] == before["rejected"] + 5
    assert [after[name] - before[name] for name in ("errors", "invalid")] == [0, 0]


def _counted(quickstart) -> dict[str, Any]:
    """Of production, whichever version that is."""
    app = serving(quickstart, "status")["applications"]["tickets"]
    return app["variants"][f"{app['version']} production"]


ENDLESS = {"regex": "((((a?){1,99}){1,99}){1,99}){1,99}"}, {"grammar": 'root ::= ((("a"?){1,99}){1,99}){1,99}'}


def test_a_form_that_takes_for_ever_does_not_stop_the_engine(quickstart, client) -> None:
    """Of each the first token took a core that had xgrammar's longer than anybody waited, and all others with it."""
    forms = [{"structured_outputs": one, "max_tokens": 8} for one in ENDLESS]
    forms.append(formed({"type": "string", "pattern": ENDLESS[0]["regex"]}))
    for form in forms:
        status, answer, _ = post(f"{quickstart['url']}/chat/completions", BODY | form)
        assert status in (200, 400), answer
        began = time.monotonic()
        assert ask(client).status_code == 200
        assert time.monotonic() - began < 20


def test_other_origins_and_other_paths_are_closed(quickstart) -> None:
    root = quickstart["url"].removesuffix("/v1")
    headers = {"Origin": "https://evil.example"}
    _, _, told = post(f"{root}/v1/chat/completions", BODY, **headers)
    assert not any(name.lower().startswith("access-control") for name in told)
    for name in ("evil.example", "evil.example:99999", "["):
        assert post(f"{root}/v1/chat/completions", BODY, Host=name)[0] == 401, "a name that points here"
    assert post(f"{root}/v1/chat/completions", BODY, **headers)[0] == 401, "a page that only wants to keep it busy"
    assert post(f"{root}/v1/chat/completions", BODY, Origin="http://localhost:3000")[0] == 200, "a page of this machine"
    for path in ("/metrics", "/v1/embeddings", "/docs", "/load_lora_adapter"):
        assert post(root + path, BODY)[0] == 404


def test_no_request_that_the_openapi_document_allows_or_forbids_breaks_the_server(quickstart) -> None:
    root = quickstart["url"].removesuffix("/v1")
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{root}/openapi.json", "--seed", "1"]
    unhurried = ["--request-timeout", "120", "--suppress-health-check", "too_slow"]
    done = subprocess.run(
        [*command, "--checks", "not_a_server_error", "--max-examples", "10", "--no-color", *unhurried],
        capture_output=True,
        text=True,
        cwd=quickstart["home"],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Tested: 8" in done.stdout


def test_the_official_client_finds_every_route_and_every_error(quickstart, client) -> None:
    told = [one.model_dump() for one in client.models.list()]
    assert [one["id"] for one in told] == ["tickets"]
    assert client.models.retrieve("tickets@production").id == "tickets@production"
    wanted = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(model="tickets", messages=ASKED, **wanted)
    streamed = list(
        client.chat.completions.create(
            model="tickets", messages=ASKED, stream=True, stream_options={"include_usage": True}, **wanted
        )
    )
    assert "".join(one.choices[0].delta.content or "" for one in streamed[:-1]) == whole.choices[0].message.content
    assert streamed[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 8
    text = client.completions.create(model="tickets", prompt="lemon", **wanted)
    pieces = list(client.completions.create(model="tickets", prompt="lemon", stream=True, **wanted))
    assert "".join(one.choices[0].text for one in pieces) == text.choices[0].text
    tool = {"type": "function", "function": {"name": "refund", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tool"):  # as vLLM does without a parser for the model's calls
        client.chat.completions.create(model="tickets", messages=ASKED, tools=[tool])
    for error, asked in (
        (openai.BadRequestError, {"model": "tickets", "temperature": -1}),
        (openai.NotFoundError, {"model": "lime"}),
        (openai.APIStatusError, {"model": "tickets", "user": "x" * 2_000_000}),
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(messages=ASKED, **asked)
        assert caught.value.body["message"]
    assert caught.value.status_code == 413


def test_clients_that_go_away_free_their_places(quickstart, client) -> None:
    host, port = quickstart["url"].removeprefix("http://").removesuffix("/v1").split(":")

    def leave(streams: bool) -> bytes:
        body = json.dumps(BODY | {"max_tokens": 400, "ignore_eos": True, "stream": streams}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.settimeout(10 if streams else 0.2)
            try:
                return connection.recv(12)
            except TimeoutError:
                return b""

    with ThreadPoolExecutor(64) as pool:
        told = set(pool.map(leave, [True, False] * 64))
    assert told == {b"", b"HTTP/1.1 200"}, "streams had begun, others waited, and none was refused"
    started = time.monotonic()
    ask(client)
    assert time.monotonic() - started < 20, "128 answers of 400 tokens would have taken a minute"


def test_keys_open_what_they_may_and_no_more(quickstart, client) -> None:
    root, lemon = quickstart["url"].removesuffix("/v1"), {"model": "tickets", "prompt": "lemon"}

    def status(key: str = "no") -> int:
        return post(f"{root}/tokenize", lemon, Authorization=f"Bearer {key}")[0]

    def admits(limited: openai.OpenAI) -> bool:
        try:
            return ask(limited).status_code == 200
        except openai.RateLimitError:
            return False

    ada = serving(quickstart, "keys", "add", "ada")["key"]
    eve = serving(quickstart, "keys", "add", "eve", "--requests-per-minute", "12")["key"]
    try:
        everywhere(status, 401)
        time.sleep(1)
        with pytest.raises(openai.AuthenticationError):
            ask(client)
        for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/feedback"):
            told, answer, headers = post(root + path, lemon, Authorization="Bearer no")
            assert (told, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert ask(client.with_options(api_key=ada)).status_code == 200
        assert status(ada) == 200
        limited, began = client.with_options(api_key=eve), time.monotonic()
        admitted = sum(admits(limited) for _ in range(24))  # by one connection, and so one replica
        assert 12 <= admitted <= 13 + (time.monotonic() - began) / 5
        with pytest.raises(openai.RateLimitError) as caught:
            ask(limited)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 5
        assert "eve" in str(caught.value)
        assert ask(limited.with_options(max_retries=4)).status_code == 200, "the official client waits as it is told"
        bob = serving(quickstart, "keys", "add", "bob", "--tokens-per-minute", "300")["key"]
        time.sleep(2)  # unasked, so that one replica has not seen this key when the other tells what it spent
        spending = client.with_options(api_key=bob)
        with spending.chat.completions.create(
            model="tickets", messages=ASKED, stream=True, **LONG | {"max_tokens": 400}
        ) as it:
            next(iter(it))  # and away, before it is told what it used
        time.sleep(2.5)
        everywhere(lambda: status(bob), 429)
        winnow("serving", "keys", "remove", "bob", env=quickstart["env"])
        bob = serving(quickstart, "keys", "add", "bob")["key"]
        everywhere(lambda: status(bob), 200)  # a new key has its own limits
    finally:
        for name in ("ada", "eve", "bob"):
            winnow("serving", "keys", "remove", name, env=quickstart["env"])
    everywhere(status, 200)


def test_an_engines_core_is_forked_from_a_process_that_had_vllm_already(quickstart) -> None:
    parent = _one_of(quickstart, "VLLM::EngineCore").parent()
    assert parent
    assert "multiprocessing.forkserver" in " ".join(parent.cmdline())
    assert any("libtorch_cpu" in part.path for part in parent.memory_maps())


def test_only_what_is_in_flight_fails_when_an_engine_dies_and_the_next_one_answers(quickstart, client) -> None:
    with load(client, 6, **LONG) as seen:
        time.sleep(2)
        before = len(seen["versions"])
        _one_of(quickstart, "VLLM::EngineCore").kill()
        killed = time.monotonic()
        while len(seen["versions"]) < before + 8 and time.monotonic() < killed + 120:
            time.sleep(0.2)
    assert len(seen["versions"]) >= before + 8, "the service is back"
    assert 0 < len(seen["errors"]) <= 6, seen["errors"]
    assert all(began < killed + 1 for began, _ in seen["errors"]), "whoever came later waited"
    assert not any(isinstance(error, openai.APIConnectionError) for _, error in seen["errors"])


def test_an_ingress_that_dies_takes_only_its_own_connections_with_it(quickstart, client) -> None:
    with load(client, 12) as seen:
        time.sleep(1)
        _one_of(quickstart, "ServeReplica:tickets:ingress").kill()
        killed = time.monotonic()
        time.sleep(4)
    assert len(seen["errors"]) < 12, "those of the other replica go on"
    assert all(began < killed + 1 for began, _ in seen["errors"])
    assert max(began for began, _ in seen["versions"]) > killed + 3


def _one_of(quickstart, name: str) -> psutil.Process:
    found = _found(quickstart, name)
    assert found, name
    return found[0]


def _found(quickstart, name: str) -> list[psutil.Process]:
    """Processes of this endpoint's cluster, and of no other."""
    head = json.loads((quickstart["home"] / "serving.json").read_text())["head"]["pid"]
    found = []
    for one in psutil.Process(head).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # or it is a zombie, which is one of those
            if name in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_a_soak_in_small_finds_its_processes_as_they_were(quickstart, client) -> None:
    script = [sys.executable, ROOT / "scripts/soak_serving.py", "--json", "--seconds", "10", "--pause", "0.02"]
    done = subprocess.run(
        [*script, "--url", quickstart["url"], "--model", "tickets"],
        env=quickstart["env"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert (told["failed"], told["leaked"]) == ({}, [])
    assert set(told["asked"]) == {"streamed", "whole", "as_json", "tokens", "mistaken", "leaving"}
    assert {one["process"] for one in told["processes"]} >= {"VLLM::EngineCore", "ray::ServeReplica:tickets:ingress"}


ENGINE = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "dtype": "float32"}
PAGE = "https://app.example"
BOTH_CORES = {"cpus_per_replica": 2}


def deploy(quickstart, file: Path, reference: str = "tickets", **settings: Any) -> None:
    file.write_text(json.dumps(settings))
    done = winnow("serving", "deploy", reference, "--settings", file, env=quickstart["env"])
    assert done.returncode == 0, done.stderr


def test_new_settings_replace_engine_and_ingress_under_load_and_lose_nothing(quickstart, client, tmp_path) -> None:
    names = ("VLLM::EngineCore", "ServeReplica:tickets:ingress")
    before = {one.pid for name in names for one in _found(quickstart, name)}
    assert len(before) >= len(names)
    with load(client, 3, pause_s=0.1) as seen:
        deploy(quickstart, tmp_path / "settings.yaml", engine_kwargs=ENGINE, ingress={"sampling": {"share": 1}})
        time.sleep(3)
    assert seen["errors"] == []
    assert not before & {one.pid for name in names for one in _found(quickstart, name)}
    time.sleep(1)  # a sample is written after its answer
    *_, samples = sorted((quickstart["home"] / "samples/tickets").glob("*.jsonl"))
    kept = json.loads(samples.read_text().splitlines()[-1])
    assert kept["messages"][:-1] == ASKED
    assert kept["messages"][-1]["role"] == "assistant"


def test_without_room_for_two_versions_requests_wait_for_the_next_one(quickstart, versions, client, tmp_path) -> None:
    production, other = versions
    with load(client, 3, pause_s=0.1) as seen:
        deploy(quickstart, tmp_path / "settings.yaml", f"tickets@{other}", engine_kwargs=ENGINE, **BOTH_CORES)
        time.sleep(1)
    assert seen["errors"] == []
    assert {version for _, version in seen["versions"]} == {production, other}


def test_a_canary_without_room_says_so_and_can_be_interrupted(quickstart, versions, client) -> None:
    """Both cores are production's since the test before this one."""
    command = [sys.executable, "-m", "serving", "canary", "tickets", versions[0], "--weight", "10"]
    waiting = subprocess.Popen(command, cwd=ROOT, env=quickstart["env"], stderr=subprocess.PIPE, text=True)
    assert waiting.stderr
    lines, enough = iter(waiting.stderr), Timer(120, waiting.kill)
    enough.start()
    try:
        assert next(lines).startswith(f"deploy: no room for {versions[0]} beside what runs; waiting for")
        assert version_of(ask(client)) == versions[1]
    finally:
        waiting.terminate()
    told = [*lines]
    enough.cancel()
    assert "deploy: back to what ran before\n" in told
    assert told[-1] == "interrupted; see 'python -m serving status'\n"
    assert waiting.wait(timeout=60) == 130
    assert version_of(ask(client)) == versions[1]


def test_the_fallback_answers_where_the_model_is_late(quickstart, versions, client, tmp_path: Path) -> None:
    """On the version that the tests before this one left: only the ingress is replaced."""
    before = {one.pid for one in _found(quickstart, "VLLM::EngineCore")}
    with fake_judge.serve() as other:
        fallback = {"base_url": f"{other.url}/v1", "endpoint_model": "elsewhere", "after_s": 0.0001}
        front = {"ingress": {"limits": {"body_timeout_s": 2}, "cors_origins": [PAGE]}, "fallback": fallback}
        settings = {"engine_kwargs": ENGINE} | BOTH_CORES | front
        deploy(quickstart, tmp_path / "settings.yaml", f"tickets@{versions[1]}", **settings)
        reply = ask(client)
        assert (reply.headers["x-winnow-fallback"], reply.headers["x-winnow-variant"]) == ("timeout", "fallback")
        assert reply.parse().choices[0].message.content == "ok"
        assert other.requests[-1]["model"] == "elsewhere"
        streamed = [*client.chat.completions.create(model="tickets", messages=ASKED, stream=True)]
        assert "".join(piece.choices[0].delta.content for piece in streamed) == "ok"
        for status, told in ((400, 400), (401, 503), (429, 503)):  # 400 is the client's own affair, the others ours
            other.failures.append(status)
            with pytest.raises(openai.APIStatusError) as caught:
                ask(client)
            assert caught.value.status_code == told
        for origin, allowed in ((PAGE, PAGE), ("https://evil.example", None)):
            _, _, headers = post(f"{quickstart['url']}/chat/completions", BODY, Origin=origin)
            assert headers.get("access-control-allow-origin") == allowed
    assert {one.pid for one in _found(quickstart, "VLLM::EngineCore")} == before, "no engine was started anew"


def test_a_body_that_does_not_come_is_not_waited_for(quickstart) -> None:
    """For longer than the two seconds that the deployment of the test before this one allows."""
    host, port = quickstart["url"].removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{")
        answer = b""
        while not answer.endswith(b"}") and (piece := connection.recv(65536)):  # head and body are two writes
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in answer


TO_ZERO = {"min_replicas": 0, "downscale_to_zero_delay_s": 11, "look_back_period_s": 11}


def test_another_model_of_ours_answers_where_one_is_late(
    quickstart, client, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._common.network_utils import find_free_port

    monkeypatch.setenv("WINNOW_HOME", str(quickstart["home"]))
    registry.promote("spare", copied(registry.find("tickets"), "spare", "the one to fall back to"), "test")
    settings = {"engine_kwargs": ENGINE, "autoscaling_config": {"max_replicas": 1}}
    deploy(quickstart, tmp_path / "settings.yaml", **settings, fallback={"model": "spare", "after_s": 0.0001})
    with pytest.raises(openai.APIStatusError, match="the fallback spare is not deployed"):
        ask(client)
    file = tmp_path / "spare.yaml"
    file.write_text(json.dumps({"engine_kwargs": ENGINE, "autoscaling_config": TO_ZERO}))
    made = serving(quickstart, "deploy", "spare", "--port", str(find_free_port()), "--settings", str(file))
    reply = ask(client)
    assert (reply.headers["x-winnow-fallback"], reply.headers["x-winnow-variant"]) == ("timeout", "fallback")
    own = ask(client.with_options(base_url=made["url"]), model="spare")
    assert reply.parse().choices[0].message.content == own.parse().choices[0].message.content
    streamed = client.chat.completions.create(model="tickets", messages=ASKED, stream=True, temperature=0, max_tokens=4)
    told = "".join(piece.choices[0].delta.content or "" for piece in streamed)
    assert told == own.parse().choices[0].message.content


def test_a_model_at_zero_replicas_answers_its_next_request(quickstart, client) -> None:
    """The one that the test before this one deployed beside the other."""
    deadline = time.monotonic() + 90
    while len(_found(quickstart, "VLLM::EngineCore")) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(_found(quickstart, "VLLM::EngineCore")) == 1
    url = serving(quickstart, "status")["applications"]["spare"]["url"]
    assert ask(client.with_options(base_url=url), model="spare").status_code == 200
    assert len(_found(quickstart, "VLLM::EngineCore")) == 2


def test_stop_ends_all_of_it(quickstart) -> None:
    head = psutil.Process(json.loads((quickstart["home"] / "serving.json").read_text())["head"]["pid"])
    family = [head, *head.children(recursive=True)]
    assert serving(quickstart, "stop") == {"stopped": ["spare", "tickets"]}
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert winnow("serving", "status", env=quickstart["env"]).stderr.strip() == "nothing is deployed"
