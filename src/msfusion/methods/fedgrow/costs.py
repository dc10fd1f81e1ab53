"""What growing together costs a participant, against FedAvg of the target; worked out before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from msfusion.batch import Batch
from msfusion.costs import Costs, StepFlops, costs_of, step_flops
from msfusion.federated.privacy import Form
from msfusion.growth.fit import GrownModel
from msfusion.growth.ligo import LiGO
from msfusion.methods.fedgrow.method import GrowMethod


@dataclass(frozen=True)
class GrowCosts:
    """What a participant's round costs, and what its round of FedAvg of the target would (`target`).

    `trainable` parameters of what trains in a round of growth; bytes of tensors per round, down and up, counted as on
    the wire; `flops_per_example` of a step with a full batch, with the making of the target's weights in it; `steps`
    has the FLOPs of a step of any size: every one makes the weights anew.
    """

    trainable: int
    bytes_down: int
    bytes_up: int
    flops_per_example: int
    peak_memory: int
    target: Costs
    steps: StepFlops

    @property
    def target_steps(self) -> StepFlops:
        """The FLOPs of a step of the target itself."""
        return StepFlops(0, self.target.flops_per_example)

    @property
    def fewer_parameters(self) -> float:
        """The share of the target's parameters that need not be trained (0 to 1)."""
        return 1 - self.trainable / self.target.parameters

    @property
    def fewer_bytes(self) -> float:
        """The share of FedAvg's bytes that need not travel in order to train; negative where more does."""
        return 1 - (self.bytes_down + self.bytes_up) / (self.target.bytes_down + self.target.bytes_up)


def grow_costs(
    method: GrowMethod, batch: Batch, *, batch_size: int | None = None, states: int = 2
) -> GrowCosts:
    """The costs of a round of growth, or of a round of the target where the method has no operator.

    `batch` shows the shapes of the inputs; `batch_size` examples are in a step. `states` are the optimiser's per
    parameter (2: Adam's). Raises MsfusionError where they cannot be predicted.
    """
    trained = target = _costs(method.target, batch, batch_size, states)
    steps = StepFlops(0, target.flops_per_example)
    held = 0
    if method.intermediate is not None:
        source = method.intermediate.state_dict()
        grown = GrownModel(method.new_operator(), source, method.target)
        trained, steps = _costs(grown, batch, batch_size, states), step_flops(grown, batch)
        held = sum(tensor.nbytes for tensor in source.values())
    moved, memory = bytes_of(method.leaving(0)), trained.peak_memory + held
    return GrowCosts(trained.parameters, moved, moved, trained.flops_per_example, memory, target, steps)


def private_steps(method: GrowMethod, participant: int, batch: Batch) -> tuple[StepFlops, StepFlops | None]:
    """The FLOPs of a step of a participant's small model, and of one of its Local-LiGO (None without one).

    Raises as `grow_costs` does.
    """
    grower, settings = method.growers[participant], method.settings
    small = StepFlops(0, costs_of(grower.small.model, batch).flops_per_example)
    if method.intermediate is None:
        return small, None
    local = LiGO(grower.plan, settings.start, form=settings.form, tied=settings.tied)
    return small, step_flops(GrownModel(local, grower.small.state, method.intermediate), batch)


def bytes_of(forms: dict[str, Form]) -> int:
    """The bytes of the entries of tensors of such types and shapes."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in forms.values())


def _costs(model: nn.Module, batch: Batch, batch_size: int | None, states: int) -> Costs:
    return costs_of(model, batch, optimizer_states_per_parameter=states, batch_size=batch_size)
