"""Processes that run the same program side by side, by number from 0, and what they tell each other.

All that crosses is bytes: flat tensors whose sizes both sides know beforehand, and small messages in JSON with a bound.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from msfusion.errors import ConfigError, TrainingError
from msfusion.quoting import quoted

SHORT = 4096
"""Bytes of a message that travel at once with its length; a longer one takes a second turn."""

LONGEST = 2**24
"""The longest message, in bytes."""

PATIENCE = timedelta(hours=1)
"""For how long a rank waits for another that says nothing, though its connection is open: longer than any training."""

MOST_RANKS = 2**16

COMMAND = "torchrun --nproc-per-node 4 -m msfusion train CONFIG --set run.engine=sharded"

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RefusedByTheFirst(TrainingError):
    """A run cannot begin or go on, and the first rank says why. Here too it has failed: so says the exit code."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} ends with the first rank, which says why")


class Ranks(ABC):
    """One process among `count` of them, whose own number is `rank`."""

    rank: int
    count: int

    @abstractmethod
    def exchange(
        self, outgoing: Mapping[int, UInt8[Tensor, " _"]], incoming: Mapping[int, int]
    ) -> dict[int, UInt8[Tensor, " _"]]:
        """Send bytes to other ranks and receive so many from others; all ranks call it at the same time.

        Who sends nothing to somebody is not among the `incoming` there. Raises TrainingError where a rank is gone.
        """

    @abstractmethod
    def share(self, message: bytes) -> list[bytes]:
        """Everybody's message, by rank; all ranks call it at the same time. Raises TrainingError as `exchange`."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds for all ranks."""
        return all(told == b"1" for told in self.share(b"1" if holds else b"0"))

    def tell(self, what: Any) -> list[Any]:
        """What all ranks tell, by rank: values that JSON can hold."""
        return [json.loads(each) for each in self.share(json.dumps(what).encode())]

    def from_first(self, what: Any = None) -> Any:
        """What the first rank tells; what others hand in is not looked at."""
        return self.tell(what if self.is_first else None)[0]


class Torchrun(Ranks):
    """The processes that `torchrun` has started, connected by gloo, or by nccl on GPUs ("cuda")."""

    def __init__(self, device: str = "cpu") -> None:
        """Raises ConfigError where torchrun did not start this process, TrainingError where the others do not come."""
        check_started_by_torchrun()
        self._device = torch.device("cpu")
        if device == "cuda":
            local = _number("LOCAL_RANK", 0, MOST_RANKS) if "LOCAL_RANK" in os.environ else 0
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"run.device is 'cuda', and this machine has {torch.cuda.device_count()} GPUs for its ranks: start "
                    "one rank for each, or set it to cpu"
                )
            self._device = torch.device("cuda", local)
        with _coming_together(), _ended_by_signals():
            if device == "cuda":
                torch.cuda.set_device(self._device)
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=self._device)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def device(self) -> torch.device:
        """Where participants train."""
        return self._device

    def exchange(
        self, outgoing: Mapping[int, UInt8[Tensor, " _"]], incoming: Mapping[int, int]
    ) -> dict[int, UInt8[Tensor, " _"]]:
        """By messages from rank to rank; what is empty is not sent."""
        received = {
            rank: torch.empty(size, dtype=torch.uint8, device=self._device)
            for rank, size in incoming.items()
            if rank != self.rank
        }
        sent = {rank: each.to(self._device) for rank, each in outgoing.items() if rank != self.rank}
        operations = [dist.P2POp(dist.irecv, each, rank) for rank, each in received.items() if len(each)]
        operations += [dist.P2POp(dist.isend, each, rank) for rank, each in sent.items() if len(each)]
        with _losing_ranks():
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return {rank: each.cpu() for rank, each in received.items()}

    def share(self, message: bytes) -> list[bytes]:
        """The beginnings of all messages at once, then the rest of the long ones."""
        if len(message) > LONGEST:
            raise TrainingError(f"a rank would tell the others {len(message)} bytes, more than {LONGEST}")
        beginnings = self._gathered(len(message).to_bytes(8, "little") + message[:SHORT].ljust(SHORT, b"\0"))
        lengths = [int.from_bytes(each[:8], "little") for each in beginnings]
        longest = max(lengths)
        if longest <= SHORT:
            return [each[8 : 8 + length] for each, length in zip(beginnings, lengths, strict=True)]
        if longest > LONGEST:
            raise TrainingError(f"a rank tells {longest} bytes, more than {LONGEST}")
        whole = self._gathered(message.ljust(longest, b"\0"))
        return [each[:length] for each, length in zip(whole, lengths, strict=True)]

    def _gathered(self, message: bytes) -> list[bytes]:
        """Everybody's message of the same length."""
        own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)
        everybody = [torch.empty_like(own) for _ in range(self.count)]
        with _losing_ranks():
            dist.all_gather(everybody, own)
        return [each.cpu().numpy().tobytes() for each in everybody]

    def close(self) -> None:
        """Let go of the connections."""
        if dist.is_initialized():
            dist.destroy_process_group()


def check_started_by_torchrun() -> None:
    """Raise ConfigError, with the command to use, where torchrun did not start this process, or not as one of ours."""
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"run.engine = 'sharded' is several processes that torchrun starts, and {missing[0]} is not set: use "
            f"{COMMAND}"
        )
    count = _number("WORLD_SIZE", 1, MOST_RANKS)
    _number("RANK", 0, count - 1)
    _number("MASTER_PORT", 0, 2**16 - 1)


def own_rank() -> int:
    """The number of this process, which torchrun has started. Raises ConfigError as `check_started_by_torchrun`."""
    check_started_by_torchrun()
    return int(os.environ["RANK"])


def _number(name: str, least: int, most: int) -> int:
    """A whole number in the environment. Raises ConfigError where it is none, or cannot be."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) <= most):
        raise ConfigError(
            f"{name} in the environment is {quoted(text)}, and must be a whole number from {least} to {most}: torchrun "
            f"sets it, so leave it to {COMMAND}"
        )
    return int(text)


@contextmanager
def _coming_together() -> Iterator[None]:
    """Turn what torch.distributed raises where the ranks do not find each other into a sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).partition("\n")[0]
        raise TrainingError(
            f"rank {os.environ['RANK']} could not join the others at {place} ({why[:300]}): this address must be that "
            "of the first rank's machine, and its port free there"
        ) from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process, though nothing of Python runs while torch waits for ranks that do not come.

    Nothing has been begun or written yet.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _losing_ranks() -> Iterator[None]:
    """Turn what torch.distributed raises where a rank has died into a sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        rank = os.environ.get("RANK", "?")
        raise TrainingError(
            f"rank {rank} has lost another rank, which has ended or does not answer (what it said stands above, or on "
            "its machine): start all ranks again with --resume and the same --out, as many as there are now"
        ) from error
