from __future__ import annotations

import pytest

from sweeps import costs

TRIALS = [
    {"state": state, "device_seconds": seconds, "trained_tokens": 100}
    for state, seconds in (("COMPLETE", 1800.0), ("COMPLETE", 1800.0), ("PRUNED", 900.0), ("FAILED", 0.0))
]
JUDGE = {"model": "m", "calls": 7, "input_tokens": 70, "output_tokens": 7, "spend_usd": 0.5}


def test_a_bill_by_hand() -> None:
    lines = {line.what: line for line in costs.bill(TRIALS, JUDGE, 2.0)}
    assert list(lines) == ["COMPLETE", "PRUNED", "FAILED", "judge m", "all"]
    assert (lines["COMPLETE"].count, lines["COMPLETE"].usd, lines["PRUNED"].usd) == (2, 2.0, 0.5)
    assert (lines["judge m"].tokens, lines["judge m"].device_seconds) == (77, None)
    assert (lines["all"].device_seconds, lines["all"].tokens, lines["all"].usd) == (4500.0, 477, pytest.approx(3.0))


def test_without_prices_there_is_no_money() -> None:
    assert {line.usd for line in costs.bill(TRIALS, None, None)} == {None}
    assert costs.bill(TRIALS, JUDGE | {"spend_usd": 0.0}, None)[-1].usd is None
    assert costs.bill([], None, 1.0)[-1].device_seconds == 0.0
