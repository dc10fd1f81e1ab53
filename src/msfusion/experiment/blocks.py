"""A run of a sum of blocks: what it adds to the figures of the other methods of `runs.slices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msfusion.experiment.forecast import Forecast
from msfusion.experiment.setup import Setup
from msfusion.experiment.slices import SlicesRun
from msfusion.federated.results import RoundResult
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.one_wide import is_one_wide_model
from msfusion.methods.parts.phases import Versions
from msfusion.width.groups import State


class BlocksRun(SlicesRun):
    """What `Prepared` asks for. Raises ConfigError where the method cannot be run as the configuration says."""

    def __init__(self, setup: Setup, forecast: Forecast) -> None:
        super().__init__(setup)
        self._method, self._forecast = forecast.method, forecast

    def observer(self) -> _Observer:
        """The phase, and what everybody computed."""
        return _Observer(self._method, self._forecast)

    def figures(self) -> dict[str, Any]:
        """As of all methods, and for the whole run what finished blocks add to that."""
        return self._with_totals(super().figures())

    def plan(self) -> dict[str, Any]:
        """As of all methods, with the same additions; whether the sum is one wide model with zeros in it; and what is
        trained and sent in each phase and round.
        """
        planned = self._with_totals(super().plan())
        more = {
            "one_wide_model": is_one_wide_model(self._method, self.setup.model, self.setup.width_map),
            "by_phase": self._forecast.by_phase(),
            "by_round": self._forecast.by_round(),
        }
        return {**planned, "sum_of_blocks": {**planned["sum_of_blocks"], **more}}

    def _with_totals(self, figures: dict[str, Any]) -> dict[str, Any]:
        """`peak_memory` with what is remembered, `flops_per_example` with the blocks that run in each step; totals of
        bytes and FLOPs, of the whole run.
        """
        rows = [
            {
                **row,
                **total,
                "peak_memory": row["peak_memory"] + total["remembered_bytes"],
                "flops_per_example": row["flops_per_example"] + total["recomputed_flops_per_example"],
            }
            for row, total in zip(figures["participants"], self._forecast.totals(), strict=True)
        ]
        phases = self._method.phases
        blocks = {"blocks": phases.blocks, "phases": phases.count}
        return {**figures, "participants": rows, "sum_of_blocks": blocks}


class _Observer:
    """Which phase it is, how many finished blocks were sent, and training FLOPs with those of remembering."""

    def __init__(self, method: BlocksMethod, forecast: Forecast) -> None:
        self._method, self._forecast = method, forecast

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before: everything is in the state."""

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        versions, attendance = Versions.of(before), result.attendance
        spent = [
            self._forecast.spent(each, result.round_index, versions)
            for each in (*attendance.on_time, *attendance.late)
        ]
        return {
            "phase": self._method.phases.phase(result.round_index) + 1,
            "finished_blocks": sum(each.finished for each in spent),
            "training_flops": sum(each.flops for each in spent),
        }
