"""Losses and metrics of one's own: their values, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.scoring import LOSSES, Scoring, loss_named, loss_told, metrics_named, number_told


class Returning(nn.Module):
    """Says its inputs, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def batch(*targets: float) -> Batch:
    return Batch((torch.tensor([[1.0], [2.0], [4.0]]),), torch.tensor(targets)[:, None])


def test_a_loss_and_metrics_by_hand_whatever_the_size_of_mini_batches() -> None:
    data = batch(1.0, 0.0, 0.0)
    for size in (1, 2, 3):
        scoring = Scoring(
            nn.functional.mse_loss,
            {"largest": lambda o, t: (o - t).abs().max()},
            batch_size=size,
            labels=False,
        )
        found = scoring.evaluate(Returning(), data)
        assert found.loss == pytest.approx((0 + 4 + 16) / 3)
        assert found.accuracy is None
        assert found.metrics == {"largest": 4.0}
    assert float(scoring.objective(Returning(), data).detach()) == pytest.approx(20 / 3)


class Counted(Returning):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("loss", [None, nn.functional.cross_entropy], ids=["classes", "own loss"])
def test_the_model_is_run_once_over_the_data_for_all_figures(loss: Any) -> None:
    data = Batch((torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 5.0]]),), torch.tensor([0, 1, 0]))
    metrics = {"seen": Counting(), "last": lambda o, t: t[-1]}
    model, scoring = Counted(), Scoring(loss, metrics, batch_size=2)
    found = scoring.evaluate(model, data)
    assert model.calls == 2  # mini-batches
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([-4.0, 0.0])]
    expected = (
        sum(float(row.exp().sum().log() - row[at]) for row, at in zip(rows, (0, 1, 0), strict=True)) / 3
    )
    assert found.loss == pytest.approx(expected)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.metrics == {"seen": 3.0, "last": 0.0}


def test_what_other_models_say_is_added() -> None:
    data = batch(1.0, 2.0, 4.0)
    offset = Batch(data.inputs, data.targets, torch.full((3, 1), 0.5))
    scoring = Scoring(nn.functional.l1_loss)
    assert float(scoring.objective(Returning(), data).detach()) == 0
    assert float(scoring.objective(Returning(), offset).detach()) == 0.5


class Counting:
    """A metric that is fed mini-batch by mini-batch."""

    def __init__(self) -> None:
        self.examples = 7

    def reset(self) -> None:
        self.examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.examples += len(targets)

    def compute(self) -> int:
        return self.examples


def test_a_metric_that_is_fed_begins_anew_in_each_evaluation() -> None:
    scoring = Scoring(nn.functional.l1_loss, {"seen": Counting()}, batch_size=2, labels=False)
    for _ in range(2):
        assert scoring.evaluate(Returning(), batch(1, 1, 1)).metrics == {"seen": 3.0}


@pytest.mark.release
def test_metrics_of_torchmetrics_are_theirs() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    outputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    data = Batch((outputs,), labels)
    found = Scoring(metrics=metrics_named(["f1", "auc"], 3, True), batch_size=7).evaluate(Returning(), data)
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")(outputs, labels)
    assert found.metrics["f1"] == pytest.approx(float(f1))
    several = Batch((outputs,), (outputs > 0.3).float())
    assert Scoring(
        loss_named("binary_cross_entropy"), metrics_named(["auc"], 3, False), labels=False
    ).evaluate(Returning(), several).metrics == {"auc": 1.0}


@pytest.mark.parametrize("name", list(LOSSES))
def test_shapes_that_torch_would_stretch_are_refused(name: str) -> None:
    flat = Batch((torch.ones(3, 1),), torch.ones(3))
    with pytest.raises(TrainingError, match=r"returned \[3, 1\] where the targets are \[3\]"):
        Scoring(loss_named(name)).objective(Returning(), flat)
    whole = Batch((torch.ones(3, 1),), torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(TrainingError, match=r"give targets\.float"):
        Scoring(loss_named(name)).objective(Returning(), whole)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda o, t: (o - t).abs(), r"a tensor of shape \[3, 1\]"),
        (lambda o, t: 1.0, "float"),
        (lambda o, t: (o - t).sum().long(), "torch.int64"),
    ],
)
def test_a_loss_that_is_no_mean_is_refused(loss: Any, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        Scoring(loss).objective(Returning(), batch(1, 1, 1))


def failing(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("a mistake")


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (failing, "failed .KeyError"),
        (lambda o, t: o, "no single number"),
        (lambda o, t: None, "no single number"),
    ],
)
def test_a_metric_that_fails_is_told_by_name(metric: Any, told: str) -> None:
    scoring = Scoring(nn.functional.l1_loss, {"theirs": metric}, labels=False)
    with pytest.raises(DataError, match=f"the metric 'theirs' {told}|the metric 'theirs' is {told}"):
        scoring.evaluate(Returning(), batch(1, 1, 1))


def test_names_that_are_none_are_refused() -> None:
    for find in (lambda: loss_named("nonsense"), lambda: metrics_named(["nonsense"], 2, True)):
        with pytest.raises(ConfigError, match="module:name"):
            find()


@pytest.mark.parametrize(
    ("number", "told"),
    [(0.0123456, "0.01235"), (12.3456, "12.35"), (-209_212.6, "-209,213"), (1.2345678e18, "1.235e+18")],
)
def test_numbers_are_told_with_four_digits_and_all_before_the_point(number: float, told: str) -> None:
    assert number_told(number) == told


def test_losses_have_four_decimals_unless_they_are_large() -> None:
    assert [loss_told(each) for each in (0.31, 999.99, 216_116_880.0)] == [
        "0.3100",
        "999.9900",
        "216,116,880",
    ]


def test_metrics_wait_for_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share a model one of them evaluates: torchmetrics would wait for the others for ever."""
    torchmetrics = pytest.importorskip("torchmetrics")

    def waits(*_: object, **__: object) -> None:
        raise AssertionError("it waits for other ranks")

    pair = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    try:
        monkeypatch.setattr(torch.distributed, "barrier", waits)
        plain = torchmetrics.MeanAbsoluteError()
        plain.update(*pair)
        with pytest.raises(AssertionError, match="waits for other ranks"):
            plain.compute()
        own = {"own": torchmetrics.MeanAbsoluteError()}
        metrics = metrics_named(["r2", "mean_squared_error"], 1, labels=False) | own
        found = Scoring(loss_named("mse"), metrics, labels=False).evaluate(
            nn.Identity(), Batch((pair[0],), pair[1])
        )
    finally:
        torch.distributed.destroy_process_group()
    assert found.metrics == {"r2": pytest.approx(-1.0), "mean_squared_error": 0.5, "own": 0.5}
