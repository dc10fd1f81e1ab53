"""Light participants for benchmarks/stream.py: they send recorded mini-batches, all as threads of one process.

They hold no model: what they send does not depend on the gradients that come back, nor the first layers on anything.
Prints, as JSON, for each round the seconds of every round trip of participant 0, and a participant's processor time.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack

from msfusion.engines.grpc.access import METHOD, Access
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.frames import (
    FORMAT,
    Answer,
    Begin,
    Finish,
    Goodbye,
    Hello,
    Layers,
    Over,
    Step,
    Thanks,
    Welcome,
)

Timed = tuple[list[list[float]], list[float]]


def replay(recording: dict[str, Any], address: str, access: Access, participant: int, everyone: int) -> Timed:
    """Take part in all rounds; the seconds of each step, and of the processor for each participant."""
    limit = [("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)]
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    channel = access.channel(address, [*limit, ("grpc.use_local_subchannel_pool", 1)])
    answers = channel.stream_stream(METHOD)(iter(said.get, None), metadata=access.metadata)

    def ask(question: Any, *expected: Any) -> Any:
        said.put(pack(question))
        return unpack(next(answers), *expected)

    agreement, steps = recording["agreement"], recording["steps"]
    ask(Hello(FORMAT, participant, bytes([participant]), recording["examples"], b"", agreement), Welcome)
    seconds, processor = [], []
    while not isinstance(begun := ask(Begin(), Layers, Over), Over):
        seconds.append([])
        before = time.process_time()
        for step in range(recording["count"]):
            pieces, targets = steps[(participant + step) % len(steps)]
            began = time.perf_counter()
            ask(Step(begun.round, step, pieces, targets), Answer)
            seconds[-1].append(time.perf_counter() - began)
        processor.append((time.process_time() - before) / everyone)
        ask(Finish(begun.round, begun.layers), Thanks)
    said.put(pack(Goodbye()))
    next(answers, None)
    said.put(None)
    channel.close()
    return seconds, processor


def main() -> None:
    recording = msgpack.unpackb(Path(sys.argv[1]).read_bytes())
    address, access, count = sys.argv[2], Access.of_participant(Path(sys.argv[3])), int(sys.argv[4])
    found: dict[int, Timed] = {}

    def run(participant: int) -> None:
        found[participant] = replay(recording, address, access, participant, count)

    threads = [threading.Thread(target=run, args=(participant,)) for participant in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"trips": found[0][0], "processor": found[0][1]}))


if __name__ == "__main__":
    main()
