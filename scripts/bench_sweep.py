"""A whole sweep, from command to winner: Winnow's packed trials against the plain way to write it with Ray Tune.

    python scripts/bench_sweep.py --json [--rounds 1]

Both sides get the same 24 configurations (Optuna's random sampler, one seed: a sampler that learns would give each side
other trials, and the ratio their luck), the same data, ASHA with the same rungs, and the same machine, one after the
other. The plain side is ``plain_sweep.py``: one CPU a trial, as many trials at once as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WINNER = "winner: "


def main() -> int:
    arguments = _arguments()
    home = Path(os.environ.setdefault("WINNOW_HOME", str(ROOT / ".winnow")))
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        file = Path(scratch) / "bench.json"
        file.write_text(json.dumps(definition(arguments.trials, arguments.slots, arguments.batch)))
        _make_inputs(home, file)
        rounds = [_round(file) for _ in range(arguments.rounds)]
    result = _medians(rounds)
    print("\n".join(f"  {name:28} {value}" for name, value in result.items()), file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    return 0


def definition(trials: int, slots: int, batch: int) -> dict[str, Any]:
    """The quickstart's sweep with more and shorter trials, as plain data."""
    from cluster import settings

    cores = len(os.sched_getaffinity(0))
    content = settings.read_yaml(ROOT / "sweeps/definitions/quickstart.yaml")
    content["name"] = "bench"
    content["search"] |= {
        "num_samples": trials,
        "sampler": "random",
        "seed": 1,
        "max_concurrent_trials": slots * cores,
        "points_to_evaluate": [],
    }
    content["search"]["space"] |= {"num_train_epochs": {"low": 1, "high": 2}}
    content["scheduler"] |= {"reduction_factor": 3}  # as in every figure that README and CONTRIBUTING give
    content["training"] |= {"per_device_train_batch_size": batch}
    content["gate"] = {"min_score": 1.0}  # the clock stops at the winner; nothing needs to be merged or registered
    content["tracking"] = {"enabled": False}
    content["resources"] = {"cpus_per_trial": 1, "engines": cores}
    return content


def _round(file: Path) -> dict[str, Any]:
    """Each side once."""
    plain_s, plain = _timed([sys.executable, "scripts/plain_sweep.py", str(file)])
    packed_s, packed = _timed([sys.executable, "-m", "sweeps", "run", str(file), "--json"])
    compared = _compared(packed_s, packed, plain_s, plain)
    print(f"  this round: {json.dumps(compared)}", file=sys.stderr, flush=True)  # all that is left of a bench cut short
    return compared


def _timed(command: list[str]) -> tuple[float, dict[str, Any]]:
    """Seconds from the command to the line that names the winner, and the object on its last line.

    What a side does after it knows the winner is not counted.
    """
    print(f"bench: {' '.join(command[1:-1])}", file=sys.stderr, flush=True)
    started, seconds = time.monotonic(), None
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(WINNER) and seconds is None:
            seconds = time.monotonic() - started
        print(f"    {line}", end="", file=sys.stderr)
    assert process.stdout is not None
    answer = process.stdout.read()
    if process.wait() not in (0, 3) or seconds is None:
        raise RuntimeError(f"{command[2]} ended with status {process.returncode} and no winner")
    return seconds, json.loads(answer.strip().splitlines()[-1])


def _compared(packed_s: float, packed: dict[str, Any], plain_s: float, plain: dict[str, Any]) -> dict[str, Any]:
    from cluster import files, paths

    engines = files.read_json(paths.engines_file(packed["run_id"]))
    total = {name: sum(engine["counters"][name] for engine in engines) for name in engines[0]["counters"]}
    trials = packed["trials"]
    winner = next(trial for trial in trials if trial["trial_id"] == packed["best_trial_id"])
    training = sum(trial["device_seconds"] for trial in trials)
    return {
        "ratio": plain_s / packed_s,
        "packed_s": packed_s,
        "plain_s": plain_s,
        "same_winner": winner["params"] == plain["winner"],
        "same_trials": sorted(map(str, (t["params"] for t in trials))) == sorted(map(str, plain["params"])),
        "packed_eval_loss": winner["eval_loss"],
        "plain_eval_loss": plain["eval_loss"],
        "packed_base_loads": total["base_loads"],
        "plain_base_loads": plain["base_loads"],
        "packed_steps": total["adapter_steps"],
        "plain_steps": plain["steps"],
        "dequantisations_per_adapter_step": total["dequantisations"] / total["adapter_steps"],
        "trained_tokens_to_winner": total["trained_tokens"],
        "idle_slot_steps": total["idle_slot_steps"] / (total["idle_slot_steps"] + total["adapter_steps"]),
        "steps_past_stop": total["steps_past_stop"] / total["adapter_steps"],
        "search_overhead_s_a_trial": (packed_s * len(os.sched_getaffinity(0)) - training) / len(trials),
    }


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number; a word that has to hold (the same winner) has to hold in every round."""
    found: dict[str, Any] = {"device": f"cpu ({len(os.sched_getaffinity(0))} cores)", "rounds": len(rounds)}
    for name, value in rounds[0].items():
        values = [one[name] for one in rounds]
        found[name] = all(values) if isinstance(value, bool) else round(statistics.median(values), 4)
    return found


def _make_inputs(home: Path, file: Path) -> None:
    """The quickstart's base and data where they are not there yet, and their snapshot, which both sides find then."""
    for made, script in (("bases/tiny", "make_tiny_base.py"), ("sources/tickets", "make_ticket_data.py")):
        if not (home / made).is_dir():
            subprocess.run([sys.executable, ROOT / "scripts" / script, "--out", home / made], check=True)
    subprocess.run([sys.executable, "-m", "sweeps", "data", file], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A whole sweep, packed against plain.")
    parser.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8, help="in each engine; one engine a core")
    parser.add_argument("--batch", type=int, default=2, help="per_device_train_batch_size, of about 39 tokens each")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
