"""lm-evaluation-harness on a contestant or on a served endpoint. Optional: Winnow does not install it by itself."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache
from typing import Any

from cluster import paths
from trainables.generation import Model
from trainables.spec import HarnessSuite


def check(suite: HarnessSuite, place: str) -> None:
    """The library is there, and so is every task.

    Args:
        place: what to call the suite in an error, such as ``evaluation.suites.NAME``.

    Raises:
        ValueError: one is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"{place}: kind lm_eval needs lm-evaluation-harness, which is not installed; install it with: "
            "bash scripts/install.sh --lm-eval"
        )
    if suite.include_path and not paths.expand(suite.include_path).is_dir():
        raise ValueError(f"{place}.include_path: no such directory: {suite.include_path!r}")
    known = _tasks(suite)
    unknown = [task for task in suite.tasks if not known.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"{place}.tasks: {unknown[0]!r} is no task of lm-evaluation-harness"
            + (f", nor of {suite.include_path!r}" if suite.include_path else "; name your own files in include_path")
        )


def score(suite: HarnessSuite, contestant: Model, batch_size: int) -> dict[str, float]:
    """``TASK.METRIC`` of every task on a model in this process, base weights in the definition's own precision.

    A metric of another filter than the task's first is ``TASK.METRIC,FILTER``, as lm_eval writes it.
    """
    from lm_eval.models.huggingface import HFLM

    return _evaluate(suite, HFLM(contestant.load(), tokenizer=contestant.tokenizer(), batch_size=batch_size))


def score_endpoint(suite: HarnessSuite, base_url: str, model: str, key: str) -> dict[str, float]:
    """The same of an OpenAI-compatible endpoint, by its chat completions: tasks that generate, not those that compare
    likelihoods.

    Raises:
        ValueError: a task asks for likelihoods, which a chat endpoint does not give.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion

    address = f"{base_url.rstrip('/')}/chat/completions"
    model_of_it = LocalChatCompletion(base_url=address, model=model, auth_token=key, num_concurrent=4)
    try:
        return _evaluate(suite.model_copy(update={"apply_chat_template": True}), model_of_it)
    except NotImplementedError as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"--tasks: a chat endpoint can only generate: {line}; name a registered model") from None


def _evaluate(suite: HarnessSuite, model: Any) -> dict[str, float]:
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=model,
        tasks=list(suite.tasks),
        task_manager=_tasks(suite),
        num_fewshot=suite.num_fewshot,
        limit=suite.limit,
        apply_chat_template=suite.apply_chat_template,
        log_samples=False,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert found is not None, "this process is the only one"
    return {
        f"{task}.{name.removesuffix(',none')}": round(float(value), 6)
        for task, measured in found["results"].items()
        for name, value in measured.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }


def _tasks(suite: HarnessSuite) -> Any:
    """Knows the tasks of the suite's own directory, and the library's thousands where those are not enough."""
    if suite.include_path:
        own = _task_manager(str(paths.expand(suite.include_path)), False)
        if all(own.match_tasks([task]) for task in suite.tasks):
            return own
    return _task_manager(str(paths.expand(suite.include_path)) if suite.include_path else None, True)


@lru_cache
def _task_manager(include_path: str | None, include_defaults: bool) -> Any:
    """Looking through the library's own takes seconds."""
    os.environ.setdefault("LOGLEVEL", "ERROR")
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR", include_path=include_path, include_defaults=include_defaults)


def absolute(suite: HarnessSuite) -> HarnessSuite:
    """The suite with its task files by their absolute path: workers have other working directories."""
    if not suite.include_path:
        return suite
    return suite.model_copy(update={"include_path": str(paths.expand(suite.include_path))})
