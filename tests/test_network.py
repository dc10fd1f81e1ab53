"""Machines and links: seconds by hand, draws that repeat, profiles with the medians that they name."""

from __future__ import annotations

import statistics

import pytest

from msfusion.errors import ConfigError
from msfusion.network import PROFILES, LogNormal, Machine, MachineKind, Uniform, machines_of


def test_the_seconds_of_a_round_by_hand() -> None:
    machine = Machine(download_megabits=8.0, upload_megabits=2.0, latency_seconds=0.5, gigaflops=4.0)
    # 3 MB down at 1 MB/s, 6 GFLOP at 4 GFLOP/s, 1 MB up at 0.25 MB/s
    assert machine.seconds(3_000_000, 6 * 10**9, 1_000_000) == pytest.approx(0.5 + 3.0 + 1.5 + 4.0)
    assert machine.seconds(0, 0, 0) == 0.5


def test_machines_are_drawn_once_and_for_all() -> None:
    kind = MachineKind(Uniform(10.0, 20.0), LogNormal(5.0, 1.0), 0.1, Uniform(1.0, 9.0), 0.2)
    machines = machines_of([kind] * 300, seed=3)
    assert machines == machines_of([kind] * 300, seed=3)
    assert machines[:7] == machines_of([kind] * 7, seed=3)  # whoever else takes part
    assert machines != machines_of([kind] * 300, seed=4)
    assert all(machine.latency_seconds == 0.1 and machine.dropout == 0.2 for machine in machines)
    downloads = [machine.download_megabits for machine in machines]
    assert 10 < min(downloads) < 11
    assert 19 < max(downloads) < 20
    assert statistics.fmean(downloads) == pytest.approx(15, abs=0.8)
    # an amount's draw is not another's
    speeds = [machine.gigaflops for machine in machines]
    assert abs(statistics.correlation(downloads, speeds)) < 0.2


def test_a_log_normal_has_its_median_and_spread() -> None:
    kind = MachineKind(LogNormal(5.0, 0.5), 1.0, 0.0, 1.0)
    values = sorted(machine.download_megabits for machine in machines_of([kind] * 2000, seed=0))
    assert statistics.median(values) == pytest.approx(5.0, rel=0.06)
    # 84 % lie below one sigma
    assert values[1682] == pytest.approx(5.0 * 2.718281828**0.5, rel=0.08)


def test_no_spread_is_the_median_and_one_point_is_itself() -> None:
    (machine,) = machines_of([MachineKind(LogNormal(5.0, 0.0), Uniform(2.0, 2.0), 0.0, 1.0)], seed=0)
    assert (machine.download_megabits, machine.upload_megabits) == (5.0, 2.0)


def test_hospitals_are_faster_than_phones_in_everything() -> None:
    phones, hospitals = (machines_of([PROFILES[name]] * 200, seed=0) for name in ("phones", "hospitals"))
    for name, faster in (
        ("download_megabits", True),
        ("upload_megabits", True),
        ("gigaflops", True),
        ("latency_seconds", False),
    ):
        middle = [
            statistics.median(getattr(machine, name) for machine in kind) for kind in (hospitals, phones)
        ]
        assert (middle[0] > middle[1]) == faster


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"download_megabits": 0.0}, "download_megabits is 0.0: it must be above 0"),
        ({"gigaflops": float("nan")}, "gigaflops is NaN"),
        ({"latency_seconds": -1.0}, "latency_seconds is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_machines(wrong: dict[str, float], sentence: str) -> None:
    usual = {"download_megabits": 1.0, "upload_megabits": 1.0, "latency_seconds": 0.0, "gigaflops": 1.0}
    with pytest.raises(ConfigError, match=f"the machine of participant 1: {sentence}"):
        machines_of([MachineKind(**usual), MachineKind(**(usual | wrong))], seed=0)
