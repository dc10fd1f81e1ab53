"""Windows of one large model for a Flower app that there is already: a strategy, and what a ClientApp says instead.

    width_map = msfusion.trace(Net(), (images[:2],))                # both: once, beside the model

    strategy = SubModels(width_map, ratio=0.25)                     # the server: in place of FedAvg

    model = sub_model(Net(), width_map, message)                    # a client: in place of Net() and its state
    ...                                                             # its own training, of any kind
    return reply(message, model, len(data), train_loss=loss)

In each round every node gets a slice of the model, the units of its window, which is `ratio` of the width of each
layer, and another one in the next round (the double shift: Xie and Li, arXiv 2407.03622). The server fuses the slices,
exactly and in whatever order. What a client trains is an ordinary module; the app's data, loop and evaluation are its
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from io import BytesIO
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import log
from numpy.lib import format as npy
from torch import Tensor, nn

from msfusion.averaging.fusion import Accumulator
from msfusion.errors import MsfusionError, UpdateError
from msfusion.width.groups import WidthMap
from msfusion.width.slices import extract
from msfusion.width.submodel import narrow
from msfusion.windows import double_shift

WINDOW, ARRAYS, METRICS = "msfusion.window", "arrays", "metrics"
"""The names of the records: units by group, tensors, and figures."""


class SubModels(FedAvg):
    """Flower's FedAvg, but that each node trains a slice of the model, so that none has to hold the whole.

    `width_map` is that of the whole model, and `ratio` the share of each layer's width that a node holds. `seed` is of
    the windows. All others are FedAvg's own settings; nodes are not asked to evaluate the whole model unless
    `fraction_evaluate` says so (give `start` an `evaluate_fn`). Raises ConfigError.
    """

    def __init__(self, width_map: WidthMap, ratio: float, seed: int = 0, **settings: Any) -> None:
        super().__init__(**{"fraction_evaluate": 0.0, **settings})
        self.width_map, self.ratio, self.seed = width_map, ratio, seed
        double_shift(self.width_map, 0, 0, ratio, participants=1)  # is it a ratio?
        self._whole: dict[str, Tensor] = {}
        self._windows: dict[int, Mapping[str, Tensor]] = {}  # of the round, by node

    def summary(self) -> None:
        """Log what is sent to whom, and FedAvg's settings."""
        log(INFO, "\t├──> msfusion: each node holds %.0f %% of each layer's width", 100 * self.ratio)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each node that FedAvg samples, with the slice of its window.

        A list, since Flower's SuperLink goes through them twice.
        """
        chosen = {
            message.metadata.dst_node_id: message
            for message in super().configure_train(server_round, arrays, config, grid)
        }
        self._whole, self._windows = tensors_in(arrays), {}
        messages = []
        for place, node in enumerate(sorted(chosen)):
            window = double_shift(
                self.width_map,
                place,
                server_round - 1,
                self.ratio,
                participants=len(chosen),
                seed=self.seed,
            )
            self._windows[node] = window
            content = RecordDict(
                {
                    self.arrayrecord_key: ArrayRecord(extract(self._whole, self.width_map, window)),
                    self.configrecord_key: config,
                    WINDOW: ConfigRecord({name: units.tolist() for name, units in window.items()}),
                }
            )
            kind = chosen[node].metadata.message_type
            messages.append(Message(content, node, kind, group_id=str(server_round)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The whole model with all slices fused into it, weighted by examples; one that does not fit is left out."""
        # Flower's own look at all replies at once would end the run for one that is not like the first
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        sums, used = Accumulator(self._whole, self.width_map), []
        for each in valid:
            source = f"node {each.metadata.src_node_id}"
            try:
                self._add(sums, each, source)
            except MsfusionError as error:
                log(WARNING, "%s is left out: %s", source, error)
            else:
                used.append(each.content)
        if not used:
            return None, None
        return ArrayRecord(sums.result()), self.train_metrics_aggr_fn(_comparable(used), self.weighted_by_key)

    def _add(self, sums: Accumulator, each: Message, source: str) -> None:
        """One node's slice. Raises UpdateError."""
        window = self._windows.get(each.metadata.src_node_id)
        if window is None:
            raise UpdateError(f"{source} has answered, and had no slice in this round")
        arrays, metrics = [*each.content.array_records.values()], [*each.content.metric_records.values()]
        if len(arrays) != 1 or len(metrics) != 1:
            raise UpdateError(
                f"{source} has sent {len(arrays)} records of arrays and {len(metrics)} of figures, not one of each"
            )
        weight = metrics[0].get(self.weighted_by_key)
        if not isinstance(weight, int | float):
            raise UpdateError(f"{source} says no number of examples")
        sums.add(window, tensors_in(arrays[0]), float(weight), source=source)


def _comparable(contents: list[RecordDict]) -> list[RecordDict]:
    """Replies with those figures that all of them have, and in one form: others have no mean."""
    figures = [next(iter(each.metric_records.values())) for each in contents]
    forms = [{name: _length(value) for name, value in each.items()}.items() for each in figures]
    common = {name for name, _ in set(forms[0]).intersection(*forms[1:])}
    return [
        RecordDict(
            {
                name: MetricRecord({key: record[key] for key in record if key in common})
                if isinstance(record, MetricRecord)
                else record
                for name, record in each.items()
            }
        )
        for each in contents
    ]


def _length(value: object) -> int | None:
    """Of a list of figures; None of one figure."""
    return len(value) if isinstance(value, list) else None


def sub_model(model: nn.Module, width_map: WidthMap, message: Message) -> nn.Module:
    """The node's slice of the model, as the message of a `SubModels` strategy has it: a module, to be trained.

    `width_map` is that of the model, whose own weights do not matter. Raises UpdateError for a message of another
    strategy, MsfusionError for one that does not fit the model.
    """
    if WINDOW not in message.content:
        raise UpdateError("the message has no window: its server uses another strategy than SubModels")
    told = message.content[WINDOW]
    window = {name: torch.tensor(units, dtype=torch.long) for name, units in told.items()}
    (arrays,) = message.content.array_records.values()
    sub = narrow(model, width_map, window)
    sub.load_state_dict(tensors_in(arrays))
    return sub


def reply(message: Message, model: nn.Module, examples: int, **figures: float) -> Message:
    """The trained slice as a node's reply, with the number of its examples, which is its weight, and figures."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    metrics = MetricRecord({"num-examples": examples, **figures})
    return Message(RecordDict({ARRAYS: ArrayRecord(state), METRICS: metrics}), reply_to=message)


def tensors_in(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of Flower's arrays, from whoever they come. Raises UpdateError for anything else."""
    return {name: _tensor_in(name, array) for name, array in arrays.items()}


def _tensor_in(name: str, array: Array) -> Tensor:
    """Read from the bytes that came, so nothing is allocated beyond their size, and nothing unpickled."""
    data, stream = array.data, BytesIO(array.data)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, in_columns, dtype = read(stream)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError("its size is another")
        values = np.frombuffer(data, dtype, offset=stream.tell())
        return torch.from_numpy(values.reshape(shape, order="F" if in_columns else "C").copy())
    except (ValueError, TypeError, SyntaxError, OverflowError) as error:
        raise UpdateError(f"the array {name!r} is damaged: it holds no numbers in NumPy's format") from error
