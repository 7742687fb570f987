"""The health lab: a planted fault is caught, a healthy chain is not, and the verdict can fail."""

from __future__ import annotations

import pytest

from amenable.health.rules import RULES
from amenable.lab.health import FAULTS, Outcome, false_alarm_interval, passed, run_fault, table


def test_every_fault_names_rules_that_exist() -> None:
    known = {rule.id: rule for rule in RULES}
    assert len(FAULTS) >= 12
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.rules
        for name in fault.rules:
            assert fault.stage in known[name].stages


@pytest.mark.parametrize(
    "name", ["policy: the sampler keeps old weights", "reward: choices shuffled"]
)
def test_a_planted_fault_is_caught_in_time(name: str) -> None:
    number = next(n for n, fault in enumerate(FAULTS) if fault.name == name)
    outcome = run_fault(number, seed=2000)
    assert outcome.caught
    assert outcome.caught_by in FAULTS[number].rules


def outcome(at: float | None, rule: str = "kl-far", name: str = FAULTS[0].name) -> Outcome:
    return Outcome(name=name, seed=0, caught_by=rule, at=at, others=(), wall_s=1.0)


def test_the_verdict_allows_one_miss_and_one_alarm_in_twenty() -> None:
    caught, late, missed = (outcome(at) for at in (0.2, 0.5, None))
    quiet, alarm = outcome(None, ""), outcome(0.3)
    faults = [("fault", caught)] * 15
    healthy = [("healthy", quiet)] * 19
    assert passed([*faults, ("fault", late), *healthy, ("healthy", alarm)])
    assert not passed([*faults, ("fault", late), ("fault", missed), *healthy])
    assert not passed([*faults, *healthy[:-1], ("healthy", alarm), ("healthy", alarm)])


def test_the_table_tells_the_misses_and_the_interval() -> None:
    low, high = false_alarm_interval(1, 20)
    assert (low, high) == pytest.approx((0.0089, 0.2361), abs=1e-3), "Wilson's"
    rows = [("fault", outcome(None, "")), *[("healthy", outcome(None, ""))] * 19]
    text = table([*rows, ("healthy", outcome(0.3, "policy: kl-far", "healthy, ppo"))])
    assert "MISSED" in text
    assert "1 of 20 healthy runs with a false alarm (5 %, 95 % interval 1 to 24 %)" in text
    assert "healthy, ppo, seed 0: policy: kl-far" in text
