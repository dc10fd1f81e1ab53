"""A node: it trains the slice that it is sent with its own images."""

from __future__ import annotations

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from digits.task import WIDTH_MAP, network, own_data, train
from msfusion.engines.flower.strategy import reply, sub_model  # msfusion

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    node = int(context.node_config["partition-id"])
    torch.manual_seed(node)
    images, labels = own_data(node, int(context.node_config["num-partitions"]))
    model = sub_model(network(), WIDTH_MAP, message)  # msfusion: was network(), and load_state_dict
    loss = train(model, images, labels, int(context.run_config["local-epochs"]))
    return reply(message, model, len(labels), train_loss=loss)  # msfusion: was Message(RecordDict(...))
