"""A method whose participants ask the server in the middle of their training: synchronous SGD with a parameter server
(Li et al., OSDI 2014). The weights are the server's; a participant sends the gradient of each mini-batch, and gets the
weights after the server's step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import msfusion
from msfusion.federated.training import round_batches


@msfusion.method("parameter_server")
@dataclass(frozen=True)
class ParameterServer(msfusion.Method):
    """Participants compute gradients; all steps are the server's, `rate` times a gradient."""

    rate: float = 0.1

    def assign(self, state, round_index, participant):
        """The weights."""
        return msfusion.Task(participant, round_index, msfusion.model_state(state))

    def train(self, task, data):
        """Ask with the gradient of each mini-batch; go on with the weights that come back."""
        model, (p, t) = self.copied(task.tensors), (task.participant, task.round_index)
        names = [name for name, _ in model.named_parameters()]
        losses = []
        batches = round_batches(data, self.problem.training[p], seed=self.seed, round_index=t, participant=p)
        for batch in batches:
            loss = self.scoring.objective(model.train(), batch)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            response = yield msfusion.Request(tensors=dict(zip(names, gradients, strict=True)))
            model.load_state_dict(response.tensors, strict=False)
            losses.append(float(loss.detach()))
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return msfusion.Update(p, t, tensors, len(data), sum(losses) / len(losses))

    def outbound_request(self, task):
        """A gradient for each weight."""
        return msfusion.Outbound.like(dict(self.model.named_parameters()))

    def conversation(self, state, round_index):
        """The server of a round."""
        return Server({name: state[name].clone() for name, _ in self.model.named_parameters()}, self.rate)

    def fuse(self, state, answered):
        """The server's weights; running statistics are averaged."""
        weights = {name: state[name] for name, _ in self.model.named_parameters()}
        return {**self.averaged(state, answered), **weights}


class Server(msfusion.Conversation):
    """The weights, and the steps that are taken on them."""

    one_by_one = True

    def __init__(self, weights: dict[str, Tensor], rate: float) -> None:
        self.weights, self.rate = weights, rate

    def answer(self, turn):
        """A step for each gradient, in the order of the turn."""
        return [self.step(request.tensors) for _, request in turn]

    def step(self, gradients):
        """The weights after a step."""
        self.weights = {name: tensor - self.rate * gradients[name] for name, tensor in self.weights.items()}
        return msfusion.Response(tensors=self.weights)

    def state(self):
        """What is in the state that `fuse` gets."""
        return self.weights
