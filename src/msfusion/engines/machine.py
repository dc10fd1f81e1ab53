"""The engine for this machine, by how many processes, how many threads, and which device."""

from __future__ import annotations

from msfusion.engines.processes import Processes
from msfusion.errors import ConfigError
from msfusion.federated.engine import Engine, InProcess


def on_this_machine(workers: int = 1, threads: int = 1, device: str = "cpu") -> Engine:
    """So many worker processes with so many threads each; one worker is this process itself.

    Raises ConfigError for a device that is not there, or several processes on one GPU.
    """
    alone = InProcess(device)  # which refuses what is no device, or is not there
    if workers == 1:
        return alone
    if device == "cuda":
        raise ConfigError(
            f"workers is {workers}, but one process fills the GPU: set it to 1, or device to cpu"
        )
    return Processes(workers, threads)
