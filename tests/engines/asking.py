"""A method whose participants ask the server while they train: a number each, answered by the sum of all so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import MsfusionError, TrainingError
from msfusion.federated.conversation import Conversation, Request, Response, Turn
from msfusion.federated.method import Answered, Method, Task, Training, Update
from msfusion.federated.privacy import Outbound
from msfusion.width.groups import State

STEPS = 3


class Sums(Conversation):
    def __init__(self, total: Tensor) -> None:
        self.total = total.clone()

    def answer(self, turn: Turn) -> list[Response | MsfusionError]:
        return [self._answer(request) for _, request in turn]

    def _answer(self, request: Request) -> Response | MsfusionError:
        if bool(request.tensors["number"] < -100):
            return TrainingError("the number is too low")
        self.total += request.tensors["number"]
        return Response((b"so far", b""), {"total": self.total.clone()}, {"bytes": len(request.pieces[0])})

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.total}


class Asking(Method):
    name = "asking"

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)

    def initial_state(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(1), "heard": torch.zeros(1)}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        return Task(participant, round_index, {"heard": state["heard"]})

    def train(self, task: Task, data: Batch) -> Training:
        assert isinstance(data.inputs, tuple)
        heard = task.tensors["heard"].clone()
        for step in range(STEPS):
            number = data.inputs[0].mean().view(1) * (step + 1) + heard / 7
            response = yield Request((b"x" * step,), {"number": number})
            assert response.pieces == (b"so far", b"")
            assert response.metadata["bytes"] == step
            heard += response.tensors["total"]
        return Update(task.participant, task.round_index, {"heard": heard}, len(data), 0.5)

    def conversation(self, state: State, round_index: int) -> Sums:
        return Sums(state["weight"])

    def outbound_request(self, task: Task) -> Outbound:
        return Outbound({"number": (torch.float32, (1,))}, pieces=1)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        heard = [
            update.tensors["heard"] for _, update in sorted(answered, key=lambda each: each[1].participant)
        ]
        return {**state, "heard": torch.stack(heard).mean(0)}
