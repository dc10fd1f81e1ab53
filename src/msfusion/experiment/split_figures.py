"""What split learning costs: each side's parameters, FLOPs and memory, and what crosses for a mini-batch."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from msfusion.batch import Batch
from msfusion.costs import Costs
from msfusion.experiment.fitting import training_costs
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.sides import Participant, Request, Server, part_of
from msfusion.width.cut import Cut
from msfusion.width.groups import State


def one_mini_batch(
    parts: Cut, state: State, data: Batch, settings: SplitSettings, training: TrainingSettings
) -> dict[str, int]:
    """The bytes that really cross for a participant's first mini-batch, by kind, where the model is in `state`.

    Without entropy coding they are those of every mini-batch of so many `examples`; with it they change as the
    model trains.
    """
    batch, wire = data.take(slice(0, training.batch_size)), settings.wire(parts)
    client_part, kept = parts.copy_of_client(), state_of(parts.server)
    client_part.load_state_dict(part_of(state, client_part))
    parts.server.load_state_dict(part_of(state, parts.server))
    still = torch.optim.SGD(
        [parameter for parameter in parts.server.parameters() if parameter.requires_grad], 0.0
    )
    client = Participant(client_part, None, wire)
    up = client.send(batch)
    ((down, _),) = Server(parts.server, still, wire).step([Request(up, batch.targets)])
    parts.server.zero_grad(set_to_none=True)
    parts.server.load_state_dict(kept)
    coded = wire.coded_bytes(up)
    return {
        "examples": len(batch),
        "activations": coded,
        "gradients": sum(map(len, down)),
        "plain_activations": client.plain_bytes,
        "plain_gradients": client.plain_bytes,
        "other_up": sum(map(len, up)) - coded + batch.targets.nbytes,
    }


def side_costs(parts: Cut, whole: nn.Module, data: Batch, training: TrainingSettings) -> dict[str, Costs]:
    """The costs of the first layers ("client"), the rest ("server") and the "whole" model, trained on the data.

    The server's are what the whole model's exceed the client's by: each is trained with the same mini-batches.
    """
    batch = data.take(slice(0, training.batch_size))
    client, all_layers = (training_costs(part, batch, training) for part in (parts.client, whole))
    rest = {each.name: getattr(all_layers, each.name) - getattr(client, each.name) for each in fields(Costs)}
    return {"client": client, "server": Costs(**rest), "whole": all_layers}
