"""A deployed app in one process: what its ServerApp and its ClientApp do, for methods of every kind."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
from commands import msfusion, refused
from quick import QUICK_GROW, QUICK_JOB
from test_serve_own_data import COUNTS, JOB, put_data
from test_serve_own_data import FUNCTIONS as PRIVATE
from timeless import metrics_of

pytest.importorskip("flwr", reason="needs flwr")

from flower_grid import FakeGrid, Node
from flwr.app import Context, Message, RecordDict

from msfusion.engines.flower import nodes
from msfusion.engines.flower.frames import FORMAT, Failed, Meet, Over, Unfit
from msfusion.engines.flower.nodes import Waiting
from msfusion.engines.flower.records import records_of, said_in
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.errors import ConfigError, MsfusionError, StreamError
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.flower import client, resident
from msfusion.experiment.flower.client import answer
from msfusion.experiment.flower.resident import Answered, Asked
from msfusion.experiment.flower.server import serve, server_main
from msfusion.experiment.train import train

pytestmark = pytest.mark.slow

SHORT = [*QUICK_JOB, "rounds=3", "training.batch_size=4", "training.local_epochs=1"]
METHODS = {
    "blocks": [*SHORT, "method.start=blocks", "participants.ratio=0.5"],
    "copies": [*SHORT, "method.start=copies", "method.grow_at=1"],
    "fresh": [*SHORT, "method.start=fresh"],
    "small": [*SHORT, "method.name=small"],
    "contrastive": [*SHORT, "method.start=fresh", "method.contrastive_weight=0.1"],
    "fedgrow": [*QUICK_GROW, "rounds=3"],
}
"""By what is remarkable: participants of `blocks` and `contrastive` keep something, those of `fedgrow` report."""

LONG = ("copies", "small", "contrastive", "fedgrow")

QUICK = Waiting(patience=10.0, deadline=60.0, look_every=0.001)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(resident, "_address", lambda *_: None)
    monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    yield
    resident._present.cache_clear()


def deployed(here: Path, overrides: list[str], name: str = "app") -> Path:
    (here / "job.toml").write_text(load_config(None, overrides).to_toml())
    made = msfusion("deploy", "flower", "job.toml", "--out", name)
    assert made.exit_code == 0, made.output
    return here / name / "msfusion_app" / "job.toml"


def node_of(config: Path, **told: object) -> Node:
    return Node(lambda message, context: answer(message, context, config), told)


def grid_of(config: Path, count: int = 3, **told: object) -> FakeGrid:
    return FakeGrid({50 + who: node_of(config, **{"partition-id": who}, **told) for who in range(count)})


def same_model(one: Path, other: Path) -> bool:
    return RunDirectory(one).model.read_bytes() == RunDirectory(other).model.read_bytes()


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "method", ["blocks", "fresh", *(pytest.param(each, marks=pytest.mark.release) for each in LONG)]
)
def test_every_method_ends_with_the_bits_of_train(method: str, here: Path) -> None:
    config = deployed(here, METHODS[method])
    serve(load_config(config), here / "served", grid_of(config), QUICK)
    train(load_config(here / "job.toml"), here / "alone")
    assert same_model(here / "served", here / "alone")
    assert metrics_of(here / "served") == metrics_of(here / "alone")


class Killed(Exception):
    """In place of a SIGKILL."""


def killed_in_round(grid: FakeGrid, number: str) -> None:
    def before(message: Message) -> None:
        if message.metadata.group_id == number:
            raise Killed

    grid.before = before


@pytest.mark.one_in_ci
@pytest.mark.parametrize("method", ["blocks", "fresh"])
def test_a_killed_run_goes_on(method: str, here: Path) -> None:
    """Of a method that keeps something, where participants have a folder for it."""
    config = deployed(here, METHODS[method])
    keep = {"keep": str(here / "kept")} if method == "blocks" else {}
    grid = grid_of(config, **keep)
    killed_in_round(grid, "3")
    with pytest.raises(Killed):
        serve(load_config(config), here / "served", grid, QUICK)
    if method == "blocks":
        with pytest.raises(MsfusionError, match="has lost what it kept in round"):
            serve(load_config(config), here / "served", grid_of(config), QUICK)
    serve(load_config(config), here / "served", grid_of(config, **keep), QUICK)
    train(load_config(here / "job.toml"), here / "alone")
    assert same_model(here / "served", here / "alone")
    assert not [*here.glob("kept/participant-*/kept-*")]


def test_two_runs_of_one_configuration_at_once_keep_apart_what_they_keep(here: Path) -> None:
    """The second begins and ends between two rounds of the first, on the same SuperNodes."""
    config, keep = deployed(here, METHODS["blocks"]), {"keep": str(here / "kept")}
    first, second = (grid_of(config, **keep) for _ in range(2))

    def before(message: Message) -> None:
        if message.metadata.group_id == "3" and not second.told:
            serve(load_config(config), here / "second", second, QUICK)

    first.before = before
    serve(load_config(config), here / "first", first, QUICK)
    assert second.told
    train(load_config(here / "job.toml"), here / "alone")
    for name in ("first", "second"):
        assert same_model(here / name, here / "alone")
        assert metrics_of(here / name) == metrics_of(here / "alone")
    assert not [*here.glob("kept/participant-*/kept-*")]


@pytest.mark.release
def test_participants_with_data_of_their_own(here: Path) -> None:
    (here / "private.py").write_text(PRIVATE)
    (here / "job.toml").write_text(JOB)
    put_data(here)
    assert msfusion("deploy", "flower", "job.toml", "--out", "app").exit_code == 0
    assert (here / "app" / "private.py").read_text() == PRIVATE
    config = here / "app" / "msfusion_app" / "job.toml"
    serve(load_config(config), here / "served", grid_of(config), QUICK)
    train(load_config(here / "job.toml"), here / "alone")
    assert same_model(here / "served", here / "alone")
    assert load_config(here / "served" / "config.toml").data.own == COUNTS


def test_the_server_app_runs_all_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = deployed(here, METHODS["fresh"])
    told = tomllib.loads((here / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    server_main(grid_of(config), context(told), config)
    said = capsys.readouterr().out
    assert "round 3/3: accuracy" in said
    assert "participant 2 has come" in said
    assert (here / "runs" / "job" / "summary.json").exists()
    server_main(FakeGrid({}), context(told), config)  # a run that is finished needs nobody


def context(run_config: dict[str, object], **node: object) -> Context:
    return Context(1, 1, node, RecordDict(), run_config)


@pytest.mark.parametrize(
    ("run_config", "why"),
    [
        ({}, "'out'"),
        ({"out": 7}, "'out'"),
        ({"out": "x", "patience": "long"}, "patience"),
        ({"out": "x", "deadline": True}, "deadline"),
        ({"out": "x", "deadline": -1}, "deadline"),
    ],
)
def test_a_run_config_that_cannot_be_is_refused(run_config: dict[str, object], why: str, here: Path) -> None:
    config = deployed(here, METHODS["fresh"])
    with pytest.raises(ConfigError, match=why):
        server_main(FakeGrid({}), context(run_config), config)
    assert not (here / "x").exists()


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("node", "why"),
    [
        ({}, "does not say which participant it is"),
        ({"partition-id": "two"}, 'partition-id in its --node-config is "two"'),
        ({"participant": True}, "it must be a whole number"),
        ({"partition-id": 2, "data": "elsewhere"}, "why is told in the log of its SuperNode"),
        ({"partition-id": 2, "keep": 7}, "why is told in the log of its SuperNode"),
        ({"partition-id": 1}, "it is participant 1, and so is node"),
        ({"partition-id": 0, "participant": 1}, "it is participant 1, and so is node"),
    ],
)
def test_a_node_that_does_not_say_who_it_is_is_refused(node: dict[str, object], why: str, here: Path) -> None:
    config = deployed(here, METHODS["fresh"])
    grid = grid_of(config)
    grid.nodes[52] = node_of(config, **node)
    with pytest.raises(StreamError) as refused:
        serve(load_config(config), here / "served", grid, QUICK)
    assert why in str(refused.value)
    assert not (here / "served").exists()


def test_more_nodes_than_participants_are_let_be(here: Path) -> None:
    config = deployed(here, METHODS["fresh"])
    said: list[str] = []
    waiting = Waiting(10.0, 60.0, 0.001, said.append)
    serve(load_config(config), here / "served", grid_of(config, 4), waiting)
    assert any("there is no participant 3" in each for each in said)


def test_another_version_of_msfusion_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import msfusion as package

    config = deployed(here, METHODS["fresh"])
    grid = grid_of(config)
    real = grid.nodes[51].app

    def app(message: Message, context: Context) -> Message:
        with monkeypatch.context() as patch:
            patch.setattr(package, "__version__", "9.9")
            return real(message, context)

    grid.nodes[51].app = app
    with pytest.raises(StreamError, match=r"version of msfusion is '9\.9'"):
        serve(load_config(config), here / "served", grid, QUICK)


def test_a_message_that_is_none_of_ours_is_answered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = deployed(here, METHODS["fresh"])
    for records in (RecordDict(), records_of(b"\xff"), records_of(pack(Meet(9)))):
        reply = answer(Message(records, 1, "query"), context({}, participant=0), config)
        assert reply.has_content()
    assert "msfusion: " in capsys.readouterr().out


@pytest.mark.parametrize("error", [StreamError("it has died"), PermissionError(13, "/secret")])
def test_one_whose_process_fails_answers_what_it_was_asked(
    error: Exception, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is asked whether it can take part says that it cannot, and not why: Flower tells what is raised."""
    config = deployed(here, METHODS["fresh"])

    def failing(*_: object) -> Answered:
        raise error

    monkeypatch.setattr(client, "hand_on", failing)
    answers = [
        unpack(said_in(answer(message, context({}, participant=0), config).content)[0], Unfit, Failed)
        for message in (
            Message(records_of(pack(each)), 1, "query") for each in (Meet(FORMAT), Over("", 3, 0))
        )
    ]
    assert answers == [Unfit("why is told in the log of its SuperNode", False), Failed()]
    assert error.args[-1] in capsys.readouterr().out


def test_one_process_answers_in_whatever_order_flower_tells_a_nodes_config(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another order each message would start one more process, which loads and traces everything again."""
    config, nodes = here / "app" / "job.toml", set[str]()

    def handed_on(asked: Asked, *_: object) -> Answered:
        nodes.add(asked.node)
        return Answered(b"", b"", [], [])

    monkeypatch.setattr(client, "hand_on", handed_on)
    told = {"partition-id": 0, "keep": "kept", "data": "mine"}
    for order in permutations(told.items()):
        answer(Message(records_of(b""), 1, "query"), context({}, **dict(order)), config)
    assert [json.loads(node) for node in nodes] == [told]


def test_a_home_in_the_run_config_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads what stands in quotes."""
    monkeypatch.setenv("HOME", str(here / "home"))
    config = deployed(here, METHODS["fresh"])
    server_main(grid_of(config), context({"out": "~/served"}), config)
    assert (here / "home" / "served" / "summary.json").exists()
    assert not (here / "~").exists()


def test_what_a_loader_says_stays_where_the_data_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = deployed(here, METHODS["fresh"])
    config.write_text(config.read_text().replace('source = "digits"', 'source = "secret:folder"'))
    message = Message(records_of(pack(Meet(FORMAT))), 1, "query")
    reply = answer(message, context({}, **{"partition-id": 0}), config)
    assert "secret:folder" not in str(reply.content)
    assert "secret:folder" in capsys.readouterr().out


# What is written, and what is not.


def test_an_app_says_all_that_it_needs(here: Path) -> None:
    deployed(here, METHODS["fresh"])
    assert sorted(
        str(each.relative_to(here / "app")) for each in (here / "app").rglob("*") if each.is_file()
    ) == [
        "README.md",
        "msfusion_app/__init__.py",
        "msfusion_app/client_app.py",
        "msfusion_app/job.toml",
        "msfusion_app/server_app.py",
        "pyproject.toml",
    ]
    assert load_config(here / "app" / "msfusion_app" / "job.toml") == load_config(here / "job.toml")
    readme = (here / "app" / "README.md").read_text()
    assert "$" not in readme.replace("$p", "").replace("$(seq 0 2)", "")
    assert "FLWR_TELEMETRY_ENABLED=0" in readme
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in readme
    assert "num-supernodes=3" in readme


def test_a_path_of_this_machine_is_named(here: Path) -> None:
    (here / "private.py").write_text(PRIVATE)
    (here / "job.toml").write_text(JOB.replace('"private:own"', '"images-{participant}"'))
    assert msfusion("deploy", "flower", "job.toml", "--out", "app").exit_code == 0
    readme = (here / "app" / "README.md").read_text()
    assert "- `data.own = 'images-{participant}'`" in readme
    assert "A simulation looks for them" in readme
    assert re.findall(r"'partition-id=\d[^']*'", readme)[:2] == [
        "'partition-id=0'",
        "'partition-id=1'",
    ]  # one machine
    assert 'data="/data/mine"' in readme


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["method.name=split", "split.at=layers.3"], "msfusion serve"),
        (["run.together=2"], "run.together"),
        (["data.source=nomodule:nowhere"], "nomodule:nowhere"),
    ],
)
def test_what_cannot_run_is_not_written(overrides: list[str], why: str, here: Path) -> None:
    settings = [part for each in [*QUICK_JOB, *overrides] for part in ("--set", each)]
    (here / "job.toml").write_text("rounds = 2\n")
    refused(msfusion("deploy", "flower", "job.toml", "--out", "app", *settings), why)
    assert [each.name for each in here.iterdir()] == ["job.toml"]


def test_a_folder_with_something_in_it_is_let_be(here: Path) -> None:
    deployed(here, METHODS["fresh"])
    before = (here / "app" / "README.md").read_bytes()
    refused(msfusion("deploy", "flower", "job.toml", "--out", "app"), "is there already")
    refused(msfusion("deploy", "flower", "job.toml", "--out", "job.toml"), "is there already")
    assert (here / "app" / "README.md").read_bytes() == before
    (here / "empty").mkdir()
    assert msfusion("deploy", "flower", "job.toml", "--out", "empty").exit_code == 0
