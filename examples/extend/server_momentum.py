"""A method with a state of its own in the server: FedAvgM, averaging with momentum (Hsu et al., arXiv 1909.06335).

msfusion train --set method.name=server_momentum:ServerMomentum --set method.beta=0.7
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import msfusion

MOMENTUM = ".momentum."
"""What the name of a momentum begins with: names with a dot in front are the method's own, never sent or exported."""


@msfusion.method("server_momentum")
@dataclass(frozen=True)
class ServerMomentum(msfusion.Method):
    """v <- beta v + (mean - theta), theta <- theta + v (section 4.3)."""

    beta: float = 0.9

    def initial_state(self) -> dict[str, Tensor]:
        """The model's weights, and a momentum of zero for each."""
        weights = super().initial_state()
        floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
        return {**weights, **{MOMENTUM + name: torch.zeros_like(tensor) for name, tensor in floating.items()}}

    def assign(self, state: dict[str, Tensor], round_index: int, participant: int) -> msfusion.Task:
        """The whole model, without the momentum."""
        return msfusion.Task(participant, round_index, msfusion.model_state(state))

    def train(self, task: msfusion.Task, data: msfusion.Batch) -> msfusion.Update:
        """Some steps on the participant's own examples."""
        return self.trained(self.working(task.tensors), task, data)

    def fuse(self, state: dict[str, Tensor], answered: msfusion.Answered) -> dict[str, Tensor]:
        """A step with momentum; what is no parameter (running statistics, counters) takes the mean."""
        fused = self.averaged(state, answered)
        for name, _ in self.model.named_parameters():
            velocity = self.beta * state[MOMENTUM + name] + (fused[name] - state[name])
            fused |= {MOMENTUM + name: velocity, name: state[name] + velocity}
        return fused
