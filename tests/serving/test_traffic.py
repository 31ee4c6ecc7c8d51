"""Which version answers: the pure function of aliases, weight and key."""

from __future__ import annotations

from collections import Counter

import pytest

from serving.traffic import NoSuchVersion, Routes

PRODUCTION = {"production": "v1"}
CANARY = PRODUCTION | {"canary": "v2"}
KEYS = [f"user-{number}" for number in range(4000)]


def shares(routes: Routes) -> Counter[tuple[str, str]]:
    return Counter(routes.choose("", key) for key in KEYS)


def test_without_a_canary_all_goes_to_production() -> None:
    assert shares(Routes(("v1", "v2"), "v2", PRODUCTION, weight=50)) == {("v1", "production"): len(KEYS)}


@pytest.mark.parametrize("weight", [0, 10, 37.5, 100])
def test_a_canary_gets_its_weight(weight: float) -> None:
    found = shares(Routes(("v1", "v2"), "v1", CANARY, weight))
    assert found["v2", "canary"] / len(KEYS) == pytest.approx(weight / 100, abs=0.025)
    assert found.total() == len(KEYS)


def test_a_key_stays_with_its_variant_and_moves_only_towards_the_canary() -> None:
    small, large = (Routes(("v1", "v2"), "v1", CANARY, weight) for weight in (10, 40))
    before = {key for key in KEYS if small.choose("", key)[1] == "canary"}
    after = {key for key in KEYS if large.choose("", key)[1] == "canary"}
    assert before == {key for key in KEYS if small.choose("", key)[1] == "canary"}
    assert before < after


def test_another_canary_draws_other_keys() -> None:
    """Nobody is the guinea pig every time."""
    one, other = (Routes(("v1", name), "v1", PRODUCTION | {"canary": name}, 10) for name in ("v2", "v3"))
    drawn = [{key for key in KEYS if routes.choose("", key)[1] == "canary"} for routes in (one, other)]
    assert len(drawn[0] & drawn[1]) / len(drawn[0]) < 0.25


def test_only_what_is_warm_is_chosen() -> None:
    assert Routes(("v1",), "v1", CANARY, 100).choose("", "ada") == ("v1", "production")
    newer = {"production": "v3", "previous": "v1"}
    assert Routes(("v1", "v2"), "v2", newer).choose("", "ada") == ("v1", "production"), (
        "v3 was registered, not deployed"
    )
    assert Routes(("v2",), "v2", newer).choose("", "ada") == ("v2", "production")
    assert Routes(("v1", "v3"), "v1", newer | {"served": "v1"}).choose("", "ada") == ("v1", "production"), "and warm"


def test_a_version_or_an_alias_can_be_named() -> None:
    routes = Routes(("v1", "v2"), "v1", CANARY, 0)
    assert routes.choose("v2", "ada") == ("v2", "direct")
    assert routes.choose("canary", "ada") == ("v2", "direct")
    with pytest.raises(NoSuchVersion):
        routes.choose("v3", "ada")
    with pytest.raises(NoSuchVersion):
        Routes(("v1",), "v1", CANARY).choose("canary", "ada")
