"""The simulated fleet: against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fleet import Fleet, averaged, simulate

#: Workers that are alike, start at once and never fail.
PLAIN = Fleet(workers=10, images=1000, seconds=2.0, hours_to_failure=1e12, start=0.0, spread=0.0, slow_share=0.0, overhead=0.0)


def test_without_trouble_the_work_is_divided() -> None:
    found = simulate(PLAIN, 10)
    assert found.efficiency == pytest.approx(1) and found.hours == pytest.approx(200 / 3600)
    assert (found.failures, found.lost, found.idle) == (0, 0, pytest.approx(0))


def test_a_last_round_that_is_not_full_is_waited_for() -> None:
    """11 shards for 10 workers: two rounds."""
    found = simulate(replace(PLAIN, images=1100), 100)
    assert found.hours == pytest.approx(400 / 3600) and found.efficiency == pytest.approx(0.55)
    assert found.idle == pytest.approx(9 * 200 / (10 * 400))


def test_overhead_and_starts_are_paid() -> None:
    assert simulate(replace(PLAIN, overhead=1.0), 1).efficiency == pytest.approx(2 / 3)
    one = replace(PLAIN, workers=1, start=100.0)
    assert 0.9 * 2000 / 2150 < simulate(one, 10).efficiency < 2000 / 2050


def test_what_failures_cost() -> None:
    """A machine of one GPU that fails every 10 hours on average, back at once: of a shard of s seconds, e^(s / life) - 1 tries
    are lost, half a shard or so each."""
    fleet = replace(PLAIN, workers=1, per_machine=1, images=200_000, seconds=1.0, hours_to_failure=10.0, repair=0.0, start=0.0)
    small, large = (averaged(fleet, shard, 8) for shard in (100, 3600))
    assert 2 < small.failures < 12  # 55 hours
    assert small.lost < 0.005 < 0.02 < large.lost < 0.12
    assert small.efficiency > large.efficiency
    assert simulate(fleet, 100, 3) == simulate(fleet, 100, 3)


def test_a_run_comes_to_its_end_though_machines_fail() -> None:
    fleet = replace(PLAIN, images=5_003, hours_to_failure=0.04, repair=60.0, start=5.0)
    for seed in range(5):
        found = simulate(fleet, 16, seed)
        assert found.failures > 0 and 0 < found.lost < 1 and found.efficiency < 1
