"""Ranks in the threads of one process, for tests: they tell each other bytes through memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from msfusion.engines.sharded.ranks import Ranks, RefusedByTheFirst
from msfusion.errors import TrainingError

Made = TypeVar("Made")


class Table:
    """What lies between the ranks."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.messages: list[bytes] = [b""] * count
        self.parcels: dict[tuple[int, int], Tensor] = {}
        self.crossed = 0


class Thread(Ranks):
    """One of them."""

    def __init__(self, table: Table, rank: int) -> None:
        self._table, self.rank, self.count = table, rank, table.count

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> dict[int, Tensor]:
        table = self._table
        for rank, parcel in outgoing.items():
            assert rank != self.rank
            table.parcels[self.rank, rank] = parcel.clone()
            table.crossed += len(parcel)
        self._wait()
        found = {rank: table.parcels.pop((rank, self.rank), None) for rank in incoming}
        for rank, size in incoming.items():
            parcel = found[rank]
            assert (0 if parcel is None else len(parcel)) == size, (rank, self.rank, size)
        self._wait()
        assert not [key for key in table.parcels if key[1] == self.rank]  # nobody sends what is not expected
        self._wait()
        return {rank: parcel for rank, parcel in found.items() if parcel is not None}

    def share(self, message: bytes) -> list[bytes]:
        self._table.messages[self.rank] = message
        self._wait()
        found = [*self._table.messages]
        self._wait()
        return found

    def _wait(self) -> None:
        try:
            self._table.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise TrainingError("another rank is gone") from error


def side_by_side(count: int, work: Callable[[Ranks], Made]) -> list[Made]:
    """What so many ranks make of the same work; the error of the lowest rank that has not lost another.

    All of them end where the first has refused something.
    """
    table, made, errors = Table(count), dict[int, Made](), dict[int, BaseException]()

    def run(rank: int) -> None:
        try:
            made[rank] = work(Thread(table, rank))
        except BaseException as error:
            errors[rank] = error
            if not isinstance(error, RefusedByTheFirst):  # which the first may still be about to say
                table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        in_order = [errors[rank] for rank in sorted(errors)]
        assert sorted({*errors, *made}) == [*range(count)]
        raise next((each for each in in_order if "another rank is gone" not in str(each)), in_order[0])
    return [made[rank] for rank in range(count)]
