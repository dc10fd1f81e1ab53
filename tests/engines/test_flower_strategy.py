"""Windows of one large model in a Flower app that there is already."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr", reason="needs flwr")

from flower_grid import FakeGrid, Node
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

import msfusion
from msfusion.engines.flower.strategy import SubModels, reply, sub_model, tensors_in
from msfusion.errors import ConfigError, UpdateError
from msfusion.width.groups import WidthMap

NODES = (11, 12, 13)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


@cache
def width_map() -> WidthMap:
    return msfusion.trace(network(), (torch.zeros(2, 6),))


def trained(model: nn.Module, number: int) -> None:
    """Whatever a client does with its slice."""
    with torch.no_grad():
        for each in model.parameters():
            each.add_(number).mul_(0.9)


def app(message: Message, context: Context) -> Message:
    number = int(context.node_config["partition-id"])
    model = sub_model(network(), width_map(), message)
    assert all(each.shape[0] < 8 for each in model.parameters())
    trained(model, number)
    return reply(message, model, number + 1, loss=0.5 * number)


def grid_of(of_second: Callable[[Message, Context], Message] = app) -> FakeGrid:
    apps = (app, of_second, app)
    return FakeGrid(
        {
            node: Node(each, {"partition-id": number})
            for number, (node, each) in enumerate(zip(NODES, apps, strict=True))
        }
    )


def run(grid: FakeGrid, rounds: int = 3, **settings: Any) -> Any:
    strategy = SubModels(width_map(), ratio=0.5, **settings)
    return strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=rounds)


def by_hand(rounds: int = 3, without: int | None = None) -> dict[str, Tensor]:
    """The same with the library alone."""
    model = network()
    for round_index in range(rounds):
        updates = []
        for number in range(3):
            window = msfusion.double_shift(width_map(), number, round_index, 0.5, participants=3)
            slice_ = msfusion.narrow(model, width_map(), window)
            trained(slice_, number)
            if number != without:
                updates.append((window, slice_.state_dict(), number + 1.0))
        model.load_state_dict(msfusion.fuse(model.state_dict(), width_map(), updates))
    return model.state_dict()


def same(arrays: ArrayRecord, state: dict[str, Tensor]) -> bool:
    tensors = tensors_in(arrays)
    return tensors.keys() == state.keys() and all(tensors[name].equal(state[name]) for name in state)


def test_it_is_the_loop_by_hand() -> None:
    grid = grid_of()
    result = run(grid)
    assert same(result.arrays, by_hand())
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx((0 * 1 + 0.5 * 2 + 1.0 * 3) / 6)
    assert {sent.metadata.message_type for sent, _ in grid.told} == {"train"}


def test_windows_move_from_round_to_round() -> None:
    grid = grid_of()
    run(grid)
    windows = [str(sent.content["msfusion.window"]) for sent, _ in grid.told]
    assert len(windows) == 9
    assert len(set(windows)) > 3


def broken(change: Callable[[RecordDict], None]) -> Callable[[Message, Context], Message]:
    def second(message: Message, context: Context) -> Message:
        answer = app(message, context)
        change(answer.content)
        return answer

    return second


def replace_first(array: Array) -> Callable[[RecordDict], None]:
    return lambda content: content["arrays"].update({"0.weight": array})  # type: ignore[union-attr]


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }".ljust(117) + b"\n"
ENDLESS = b"\x93NUMPY\x01\x00v\x00" + HEADER


@pytest.mark.parametrize(
    "array",
    [
        Array(np.ones((3, 3), np.float32)),
        Array(np.ones((4, 6), np.float64)),
        Array(np.full((4, 6), np.nan, np.float32)),
        Array("float32", (4, 6), "numpy.ndarray", b"\x80\x04N."),
        Array("float32", (4, 6), "numpy.ndarray", ENDLESS),
        Array("float32", (4, 6), "numpy.ndarray", b""),
    ],
)
def test_a_slice_that_does_not_fit_is_left_out(array: Array) -> None:
    assert same(run(grid_of(broken(replace_first(array)))).arrays, by_hand(without=1))


def test_a_weight_that_is_none_is_left_out() -> None:
    change = lambda content: content["metrics"].update({"num-examples": -1})  # noqa: E731
    assert same(run(grid_of(broken(change))).arrays, by_hand(without=1))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update({"more": ArrayRecord({"x": torch.ones(1)})}),
        lambda content: content.update({"more": MetricRecord({"x": 1})}),
        lambda content: content.pop("arrays"),
        lambda content: content["metrics"].pop("num-examples"),
        lambda content: content["metrics"].update({"num-examples": [1, 2]}),
        lambda content: content["metrics"].update({"num-examples": 0}),
        lambda content: content["arrays"].pop("0.weight"),
    ],
)
def test_a_reply_of_another_form_ends_nothing(change: Callable[[RecordDict], None]) -> None:
    assert same(run(grid_of(broken(change))).arrays, by_hand(without=1))


@pytest.mark.parametrize("odd", [{"more": 1.0}, {"accuracy": [0.5]}])
def test_a_figure_that_not_all_have_in_one_form_has_no_mean(odd: dict[str, Any]) -> None:
    def change(content: RecordDict) -> None:
        content["metrics"].update(odd)  # type: ignore[union-attr]

    result = run(grid_of(broken(change)))
    assert same(result.arrays, by_hand())
    assert [*result.train_metrics_clientapp[1]] == ["loss"]


def test_arrays_in_columns_are_read() -> None:
    values = np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3))
    assert tensors_in(ArrayRecord({"a": Array(values)}))["a"].equal(torch.arange(6).view(2, 3))


def test_another_strategys_message_is_refused() -> None:
    message = Message(RecordDict({"config": ConfigRecord({})}), 1, "train")
    with pytest.raises(UpdateError, match="SubModels"):
        sub_model(network(), width_map(), message)


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_an_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        SubModels(width_map(), ratio)
