"""Each part that is written outside of the package keeps the laws of its kind, and runs from the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion as command_line
from commands import process
from documented_readers import unregistered
from quick import QUICK_JOB

import msfusion

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "extend"
QUICK = [part for setting in QUICK_JOB for part in ("--set", setting)]


@pytest.fixture(autouse=True)
def _registered_here_alone() -> Iterator[None]:
    """A module registers its part when it is imported; tests of other files go through all that are registered."""
    with unregistered():
        yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fedprox", "FedProx"),
        ("server_momentum", "ServerMomentum"),
        ("parameter_server", "ParameterServer"),
    ],
)
def test_methods_keep_the_laws(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    msfusion.check_method(getattr(imported(module, monkeypatch), name)())


def test_fedprox_without_a_pull_is_federated_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that nobody narrows: the same bits as the method of the house."""
    made = imported("fedprox", monkeypatch).FedProx
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    data = [(x[each::3], (x[each::3, 0] > 0).long()) for each in range(3)]
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    states = []
    for method in (made(mu=0.0), msfusion.FedAvg(), made(mu=5.0)):
        federation = msfusion.Federation(
            model, data, method=method, training=msfusion.Training(learning_rate=0.1, batch_size=2)
        )
        federation.fit(2)
        states.append(federation.state)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    before = model.state_dict()
    near, far = (
        sum(float((state[name] - before[name]).norm()) for name in before) for state in (states[2], states[1])
    )
    assert near < far / 2


def test_a_parameter_server_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two participants with one mini-batch each: two steps, the second on a gradient at the old weights."""
    made = imported("parameter_server", monkeypatch)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(3, 2)
    federation = msfusion.Federation(
        model,
        [(x[:3], y[:3]), (x[3:], y[3:])],
        method=made.ParameterServer(rate=0.5),
        training=msfusion.Training(batch_size=3),
    )
    federation.fit(1)
    weight = model.weight.detach().clone().requires_grad_()
    bias = model.bias.detach().clone().requires_grad_()
    losses = [
        torch.nn.functional.cross_entropy(x[half] @ weight.T + bias, y[half])
        for half in (slice(3), slice(3, 6))
    ]
    gradients = [torch.autograd.grad(loss, (weight, bias)) for loss in losses]
    torch.testing.assert_close(federation.state["weight"], weight - 0.5 * (gradients[0][0] + gradients[1][0]))
    torch.testing.assert_close(federation.state["bias"], bias - 0.5 * (gradients[0][1] + gradients[1][1]))


def test_momentum_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    made = imported("server_momentum", monkeypatch)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    federation = msfusion.Federation(
        torch.nn.Linear(3, 2), [(x, (x[:, 0] > 0).long())], method=made.ServerMomentum(beta=0.5)
    )
    first, second = [dict(federation.state) for _ in federation.rounds(2)]
    velocity = second[".momentum.weight"]
    assert torch.equal(second["weight"], first["weight"] + velocity)
    assert ".momentum.weight" not in dict(federation.model().named_parameters())
    assert not any(name.startswith(".") for name in federation.method.assign(second, 2, 0).tensors)


@pytest.mark.release
@pytest.mark.slow
def test_the_engine_keeps_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    msfusion.check_engine(imported("socket_engine", monkeypatch).Sockets())


@pytest.mark.slow
def test_the_codec_keeps_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = imported("sign_codec", monkeypatch).Signs()
    msfusion.check_codec(signs, tolerance=2.0)
    values = torch.tensor([1.0, -3.0, 2.0, -2.0])
    assert msfusion.codecs.decode(signs.encode(values)).tolist() == [2.0, -2.0, 2.0, -2.0]
    assert len(signs.encode(torch.randn(800))) == signs.encoded_size((800,)) < 120


@pytest.mark.release
def test_the_schedule_keeps_the_laws_and_finds_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = imported("top_k_windows", monkeypatch).top_k
    msfusion.check_schedule(schedule)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    width_map = msfusion.trace(model, (torch.zeros(2, 4),))
    with torch.no_grad():
        model[0].weight[[2, 5, 7]] = 100.0
    window = schedule(width_map, 0, 0, 0.5, participants=4, state=model.state_dict())
    assert {2, 5, 7} <= set(next(iter(window.values())).tolist())


def test_the_average_and_the_metric_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported("geometric_median", monkeypatch)
    values = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [900.0, 900.0]]).double()
    found = module.geometric_median(values)
    assert float(found.norm()) < 2  # one of four does not move it far
    apart = (values - found).norm(dim=1)
    for step in torch.eye(2).double() * 0.01:
        assert (values - found - step).norm(dim=1).sum() > apart.sum()
    outputs = torch.eye(3)[[0, 0, 1, 2]]
    assert float(module.macro_recall(outputs, torch.tensor([0, 1, 1, 2]))) == pytest.approx((1 + 0.5 + 1) / 3)


RUNS: dict[str, Sequence[str]] = {
    "fedprox": ("method.name=fedprox:FedProx", "method.mu=0.1"),
    "momentum": ("method.name=server_momentum:ServerMomentum",),
    "top k": ("method.name=windows", "method.schedule=top_k_windows:top_k"),
    "codec": ("method.name=split", "split.at=layers.3", "split.gradients={codec='sign_codec:Signs'}"),
    "average": (
        "method.name=small",
        "method.average=geometric_median:geometric_median",
        "evaluation.metrics=['geometric_median:macro_recall']",
    ),
    "engine": ("run.engine=socket_engine:Sockets", "method.start=fresh"),
}


def runs() -> list[Any]:
    """A second method and the schedule, whose own numbers are tested above, are left to `scripts/check --all`."""
    longer = ("momentum", "top k")
    return [pytest.param(name, marks=pytest.mark.release if name in longer else ()) for name in RUNS]


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize("name", runs())
def test_from_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, planned, resumed and (a model of its own aside) exported, with nothing written for it anywhere else."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds the current directory to it
    given = [part for setting in RUNS[name] for part in ("--set", setting)]
    out = str(tmp_path / "run")
    for command in (
        ["plan", *QUICK, *given],
        ["train", *QUICK, *given, "--out", out],
        ["train", *QUICK, *given, "--out", out, "--resume"],
        ["export", out, "--out", str(tmp_path / "model")],
    ):
        done = command_line(*command)
        assert done.exit_code == 0, (command, done.output)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert 0 <= lines[-1]["accuracy"] <= 1
    assert ("macro_recall" in lines[-1].get("metrics", {})) == (name == "average")


@pytest.mark.release
@pytest.mark.slow
def test_sockets_end_with_the_bits_of_one_process(tmp_path: Path) -> None:
    found = []
    for extra in ([], ["--set", "run.engine=socket_engine:Sockets"]):
        out = tmp_path / str(len(found))
        done = process("train", *QUICK, "--set", "method.start=fresh", *extra, "--out", str(out), cwd=FOLDER)
        assert done.returncode == 0, done.stderr
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.release
@pytest.mark.slow
def test_a_method_of_ones_own_is_compared_with_ours(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[data]\npartition = 'iid'\n")
    done = process(
        "compare", str(tmp_path / "job.toml"), *QUICK, "--methods", "fedprox:FedProx,fedavg,small", "--seeds", "2",
        "--out", str(tmp_path / "out"), cwd=FOLDER,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "out" / "compare.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == {"fedprox:FedProx", "fedavg", "small"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("method.mu=high", r"method.mu = .high. should be a valid number"),
        ("method.nu=1", r"there is no key .method.nu."),
    ],
)
def test_a_mistake_in_its_settings_is_told(
    given: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msfusion.experiment.config import load_config

    imported("fedprox", monkeypatch)
    with pytest.raises(msfusion.ConfigError, match=sentence):
        load_config(None, [*QUICK_JOB, "method.name=fedprox:FedProx", given])


def test_what_is_no_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from msfusion.experiment.config import load_config

    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("fedprox:dataclass", "fedprox:Nothing", "no_such_module:Class"):
        with pytest.raises(msfusion.ConfigError, match=r"method\.name"):
            load_config(None, [*QUICK_JOB, f"method.name={name}"])
    assert "fedprox" in sys.modules
