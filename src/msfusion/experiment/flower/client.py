"""What the ClientApp of a deployed run does. Flower starts it anew for each message.

Importing torch, loading the data and tracing the model take longer than most rounds. So the first message starts a
process that stays (`resident`), and each ClientApp hands its message on to that. Nothing here imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context, Message

from msfusion.engines.flower.frames import excuse, told_here
from msfusion.engines.flower.records import keep_in, kept_in, records_of, said_in
from msfusion.engines.grpc.packing import pack
from msfusion.experiment.flower.resident import Asked, hand_on

NUMBERS = ("participant", "partition-id")
"""The keys of a SuperNode's --node-config that say which participant it is; the first goes before the second."""


def answer(message: Message, context: Context, config: Path) -> Message:
    """What the ClientApp answers to a message of `server_main`. Raises nothing that may quote data.

    The SuperNode's --node-config says which `participant` it is (or `partition-id`), where its own `data` is if not
    where data.own says, and in which folder to `keep` what its method has it keep, and a log of what has left it.
    """
    frame = b""
    try:
        frame, body = said_in(message.content)
        kept = kept_in(context.state)
        # by name: Flower hands it to each ClientApp in another order, and it says which process is handed the message
        node = json.dumps(dict(context.node_config), sort_keys=True)
        asked = Asked(node, frame, body, list(kept), list(kept.values()))
        done = hand_on(asked, config, context.run_id, context.node_id)
        keep_in(context.state, dict(zip(done.rounds, done.kept, strict=True)))
    except Exception as error:  # Flower would tell the server
        print(f"msfusion: {told_here(error)}", flush=True)
        return Message(records_of(pack(excuse(frame))), reply_to=message)
    return Message(records_of(done.frame, done.body), reply_to=message)
