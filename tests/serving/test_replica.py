"""What a replica's engine is started with, and how one that is silent is found; both without an engine."""

from __future__ import annotations

import asyncio

from serving import engine
from serving.spec import ServingSpec


def test_grammars_are_of_a_kind_that_bounds_a_step_unless_settings_say_otherwise() -> None:
    def structured(**kwargs: object) -> dict:
        return engine.engine_kwargs(ServingSpec(engine_kwargs=kwargs))["structured_outputs_config"]

    assert structured() == {"backend": "guidance"}
    assert structured(structured_outputs_config={"disable_any_whitespace": True}) == {
        "backend": "guidance",
        "disable_any_whitespace": True,
    }
    assert structured(structured_outputs_config={"backend": "xgrammar"}) == {"backend": "xgrammar"}


def test_whoever_does_not_answer_is_silent_and_whoever_fails_is_not(monkeypatch) -> None:
    monkeypatch.setattr(engine, "_ASK_S", 0.0)
    asked: list[float] = []

    async def answers_then_fails_then_is_silent() -> None:
        asked.append(0.0)
        if len(asked) == 2:
            raise RuntimeError("dead")
        if len(asked) == 4:
            await asyncio.sleep(60)

    async def run() -> None:
        async with asyncio.timeout(10):
            await engine.until_silent(answers_then_fails_then_is_silent, 0.2)

    asyncio.run(run())
    assert len(asked) == 4
