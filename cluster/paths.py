"""Every path that Winnow builds, under ``WINNOW_HOME`` (default ``.winnow`` in the working directory).

No other module joins these names by hand, so the layout on disk is this page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
DATA_SUFFIXES = (".jsonl", ".parquet")
NAME_RULE = "letters, digits, '-' and '_' only, first and last a letter or digit, at most 63 characters"


def package(name: str) -> Path:
    """The directory of one of Winnow's own packages."""
    return Path(__file__).parent.parent / name


def home() -> Path:
    """The absolute root of all that Winnow stores."""
    return Path(os.environ.get("WINNOW_HOME") or ".winnow").absolute()


def check_name(kind: str, name: str) -> str:
    """``name`` itself, if it may become one directory's name and part of a URL.

    Raises:
        ValueError: it may not; slashes and dots would leave the directory that it is meant for.
    """
    if not _NAME.fullmatch(name) or len(name) > 63:
        raise ValueError(f"{kind} must be {NAME_RULE}, but got {name!r}")
    return name


def expand(path: str) -> Path:
    """A path from a definition: ``${WINNOW_HOME}`` and ``~`` replaced, relative to the working directory."""
    return Path(path.replace("${WINNOW_HOME}", str(home()))).expanduser().absolute()


def is_hub_id(name: str) -> bool:
    """Whether a definition's name of a model or of data can only be a hub's: ``org/name``, and nothing here has it."""
    plain = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(DATA_SUFFIXES)
    return bool(plain) and not expand(name).exists()


def datasets() -> Path:
    return home() / "datasets"


def data_page(dataset_hash: str) -> Path:
    """The data for people. It stands beside the snapshot, for there is one too where the data is refused."""
    return datasets() / f"{dataset_hash}.html"


def runs() -> Path:
    return home() / "runs"


def run_dir(run_id: str) -> Path:
    return runs() / check_name("a run id", run_id)


def require_run(run_id: str) -> None:
    """
    Raises:
        ValueError: there is no such run; names those that there are.
    """
    if not sweep_file(run_id).exists():
        known = sorted(path.parent.name for path in runs().glob("*/sweep.json"))
        raise ValueError(f"no run {run_id!r}; there are: {', '.join(known) or 'none'}")


def sweep_file(run_id: str) -> Path:
    return run_dir(run_id) / "sweep.json"


def dataset_file(run_id: str) -> Path:
    """Which snapshot the run's trials train on, for a run that is resumed."""
    return run_dir(run_id) / "dataset.json"


def result_file(run_id: str) -> Path:
    return run_dir(run_id) / "result.json"


def report_file(run_id: str) -> Path:
    return run_dir(run_id) / "report.html"


def study_file(run_id: str) -> Path:
    """Optuna's journal: the record of every trial."""
    return run_dir(run_id) / "optuna.journal"


def engines_file(run_id: str) -> Path:
    """What the engines of a packed run did: counted work, and which trial held which slot when."""
    return run_dir(run_id) / "engines.json"


def lock_file(run_id: str) -> Path:
    """Held by the one driver that may write the run."""
    return run_dir(run_id) / "driver.lock"


def scores_file(run_id: str, contestant: str) -> Path:
    """Scores and answers of the base or the winner on the test split and the general set."""
    return run_dir(run_id) / f"scores-{contestant}.json"


def judge_file(run_id: str) -> Path:
    """What the judge said of the contestants' answers, and what that took."""
    return run_dir(run_id) / "judge.json"


def review_file(run_id: str) -> Path:
    """What people said of them, without knowing whose answer was whose."""
    return run_dir(run_id) / "review.json"


def judge_cache() -> Path:
    """The judge's answers by what it was asked: nothing is paid for twice."""
    return home() / "judge"


def trials_dir(run_id: str) -> Path:
    """Ray Tune's experiment directory, one directory a trial in it."""
    return run_dir(run_id) / "trials"


def trial_dir(run_id: str, trial_id: str) -> Path:
    return trials_dir(run_id) / check_name("a trial id", trial_id)


def adapter_dir(run_id: str, trial_id: str) -> Path:
    return trial_dir(run_id, trial_id) / "adapter"


def registry() -> Path:
    return home() / "registry"


def model_dir(model: str) -> Path:
    return registry() / check_name("a model's name", model)


def version_dir(model: str, version: str) -> Path:
    return model_dir(model) / check_name("a model's version", version)


def compiled_dir(model: str, part: str) -> Path:
    """What vLLM compiled and found out on nodes of any kind, for all versions of a model: safe to remove, and made anew
    then."""
    return home() / "compiled" / check_name("a model's name", model) / check_name("a part's name", part)


def samples_file(model: str, day: str) -> Path:
    """Requests to a served model that were kept that day, without personal data."""
    return home() / "samples" / check_name("a model's name", model) / f"{day}.jsonl"


def api_keys_file() -> Path:
    """Who may ask the served models: names, hashes and limits."""
    return home() / "keys.json"


def api_keys_writing_file() -> Path:
    """Held by the one command that changes them."""
    return home() / "keys.lock"


def serving_state_file() -> Path:
    """Which Ray cluster ``python -m serving deploy`` started, so that ``stop`` ends that one and no other."""
    return home() / "serving.json"


def serving_lock_file(model: str) -> Path:
    """Held by the one command that may bring versions of a model up and let them go."""
    name = check_name("a model's name", model)
    return home() / f"serving-{name}.lock"


def cluster_users_file() -> Path:
    """Held, with others, by each command that uses the cluster."""
    return home() / "cluster-users.lock"


def cluster_writing_file() -> Path:
    """Held by the one command that starts or ends the cluster, or writes what is deployed there."""
    return home() / "cluster-writing.lock"


def port_file(port: int) -> Path:
    """Held by the one command that is about to have a model listen there."""
    return home() / f"port-{port}.lock"


def serving_log() -> Path:
    """What that cluster's head node says."""
    return home() / "serving.log"
