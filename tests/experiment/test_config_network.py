"""[network], and the keys of [participants] and [evaluation] that go with it: values, and one sentence for mistakes."""

from __future__ import annotations

import tomllib

import pytest

from msfusion.errors import ConfigError
from msfusion.experiment.config import Config, load_config
from msfusion.federated.capacities import Capacities, FromRound, OneOf
from msfusion.network import PROFILES, LogNormal, MachineKind, Uniform

MACHINE = "{download_megabits=20,upload_megabits=5,gigaflops=4}"


def test_a_profile_one_machine_for_all_and_one_for_each() -> None:
    named = load_config(None, ["network.profile='phones'"]).network
    assert named is not None
    assert named.kinds(3) == (PROFILES["phones"],) * 3
    one = load_config(None, [f"network.machines={MACHINE}"]).network
    assert one is not None
    assert one.kinds(2) == (MachineKind(20.0, 5.0, 0.0, 4.0),) * 2
    spread = (
        "{download_megabits={median=20,sigma=0.5},upload_megabits={low=1,high=5},gigaflops=4,"
        "latency_seconds=0.1,dropout=0.2}"
    )
    each = load_config(None, ["participants.count=2", f"network.machines=[{MACHINE},{spread}]"])
    assert each.network is not None
    assert each.network.kinds(2)[1] == MachineKind(LogNormal(20.0, 0.5), Uniform(1.0, 5.0), 0.1, 4.0, 0.2)
    assert Config.model_validate(tomllib.loads(each.to_toml())) == each


def test_ratios_that_change() -> None:
    text = [
        "participants.count=2",
        "participants.ratio=[{any_of=[1,0.5]},{from_round={10=0.25,1=1.0,9=0.5}}]",
    ]
    config = load_config(None, text)
    steps = FromRound(((0, 1.0), (8, 0.5), (9, 0.25)))
    assert config.capacities == Capacities((OneOf((1.0, 0.5)), steps), 0)
    assert Config.model_validate(tomllib.loads(config.to_toml())).capacities == config.capacities
    everybody = load_config(None, ["participants.ratio={any_of=[1.0,0.5]}"])
    assert everybody.capacities == Capacities((OneOf((1.0, 0.5)),) * 10, 0)
    assert everybody.changed({"participants.ratio": 0.25}).participants.ratios == (0.25,) * 10


def test_a_configuration_without_them_is_what_it_was() -> None:
    table = load_config(None).to_table()
    assert "network" not in table
    assert set(table["participants"]) == {"count", "ratio", "fraction"}
    assert "target_accuracy" not in table["evaluation"]


def test_a_target_can_be_set_afterwards_but_not_a_network() -> None:
    plain = load_config(None)
    assert plain.difference(load_config(None, ["evaluation.target_accuracy=[0.8,0.9]"])) is None
    assert plain.difference(load_config(None, ["network.profile='phones'"])) is not None
    assert load_config(None, ["evaluation.target_accuracy=0.8"]).evaluation.targets == (0.8,)
    assert plain.evaluation.targets == ()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("network={}", "network = {} should have either a profile or machines"),
        (f"network={{profile='phones',machines={MACHINE}}}", "should have either a profile or machines"),
        ("network.profile='phone'", "should have as its profile one of phones, hospitals"),
        ("network={profile='phones',late='downweight'}", "should have a deadline, if late updates"),
        ("network={profile='phones',deadline=0}", "network.deadline = 0 should be above 0"),
        (
            "network={profile='phones',late='never'}",
            "network.late = \"never\" should be 'drop' or 'downweight'",
        ),
        (f"network.machines=[{MACHINE}]", "network.machines should be one table, or one for each of the 10"),
        ("network.machines={download_megabits=1}", "network.machines lacks the key 'network.machines."),
        (
            "network.machines={download_megabits=1,upload_megabit=1,gigaflops=1}",
            r"there is no key 'network.machines.upload_megabit' \(did you mean 'network.machines.upload_megabits'",
        ),
        (
            "network.machines={download_megabits=0,upload_megabits=1,gigaflops=1}",
            "network.machines.download_megabits = 0 should be above 0",
        ),
        (
            "network.machines={download_megabits={low=3,high=1},upload_megabits=1,gigaflops=1}",
            "should have a low that is not above its high",
        ),
        (
            "network.machines={download_megabits={low=3,sigma=1},upload_megabits=1,gigaflops=1}",
            r"should have median and sigma \(log-normal\) or low and high",
        ),
        (
            "network.machines={download_megabits=1,upload_megabits=1,gigaflops=1,latency_seconds=-1}",
            "network.machines.latency_seconds = -1 should be at least 0",
        ),
        ("participants.ratio={any_of=[]}", "participants.ratio = .* should be a number, or"),
        ("participants.ratio={from_round={2=0.5}}", "that begins with round 1"),
        ("participants.ratio={from_round={1=2}}", "greater than 0 and at most 1"),
        ("participants.ratio={sometimes=1}", "participants.ratio = .* should be a number, or"),
        ("participants.dropout=1", "participants.dropout = 1 should be a number at least 0 and below 1"),
        ("participants.dropout=[0.1]", "should be one number, or one for each of the 10 participants"),
        ("participants.minimum_ratio=0.5", "should have somebody with at least the minimum_ratio, 0.5"),
        ("participants={budget={memory=9},ratio={any_of=[0.5]}}", "should not have a budget"),
        (
            "evaluation.target_accuracy=80",
            "evaluation.target_accuracy = 80 should be a number greater than 0",
        ),
    ],
)
def test_mistakes_are_one_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(None, [setting])
    assert "\n" not in str(caught.value)
