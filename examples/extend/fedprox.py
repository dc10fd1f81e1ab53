"""A method of one's own: FedProx, federated averaging with a pull towards what was received (Li et al., MLSys 2020).

msfusion train --set method.name=fedprox:FedProx --set method.mu=0.1
msfusion compare --methods fedprox:FedProx,fedavg --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import msfusion


@msfusion.method("fedprox")
@dataclass(frozen=True)
class FedProx(msfusion.Method):
    """Everybody trains the whole model, on its own loss + mu/2 |theta - theta received|^2 (equation 2)."""

    mu: float = 0.01

    def assign(self, state: dict[str, Tensor], round_index: int, participant: int) -> msfusion.Task:
        """The whole model."""
        return msfusion.Task(participant, round_index, msfusion.model_state(state))

    def train(self, task: msfusion.Task, data: msfusion.Batch) -> msfusion.Update:
        """Some steps on the participant's own examples."""

        def objective(model: nn.Module, batch: msfusion.Batch) -> Tensor:
            apart = [(each - task.tensors[name]).square().sum() for name, each in model.named_parameters()]
            return self.scoring.objective(model, batch) + self.mu / 2 * sum(apart)

        return self.trained(self.working(task.tensors), task, data, objective)

    def fuse(self, state: dict[str, Tensor], answered: msfusion.Answered) -> dict[str, Tensor]:
        """The mean, weighted by examples."""
        return self.averaged(state, answered)
