from __future__ import annotations

from pathlib import Path

import pytest

from trainables.contract import TrialFailure, evaluation_steps, is_whole, seal, shared_step


@pytest.mark.parametrize(
    ("an_epoch", "epochs", "evals", "expected"),
    [
        (10, 2, 1, [10, 20]),
        (11, 1, 2, [6, 11]),
        (7, 1.5, 2, [4, 7, 11]),
        (3, 0.1, 4, [1]),
        (5, 1, 100, [1, 2, 3, 4, 5]),
    ],
)
def test_evaluations_come_after_their_share_and_at_the_end(an_epoch, epochs, evals, expected) -> None:
    assert evaluation_steps(an_epoch, epochs, evals) == expected


def test_trials_of_different_batch_sizes_share_the_step_axis() -> None:
    assert shared_step(epoch=0.5, examples=100, reference_batch=10) == 5
    assert shared_step(epoch=2.0, examples=100, reference_batch=10) == 20


def test_a_checkpoint_cut_short_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"12345")
    assert not is_whole(tmp_path)
    seal(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "adapter" / "weights").write_bytes(b"123")
    assert not is_whole(tmp_path)


def test_a_failure_survives_pickling() -> None:
    import pickle

    failure = pickle.loads(pickle.dumps(TrialFailure("oom", "out of memory")))  # noqa: S301
    assert (failure.reason, failure.message) == ("oom", "out of memory")
