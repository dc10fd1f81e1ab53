"""Who carries out the rounds: this process, several processes, and machines over a network.

Each is an `Engine` (`federated.engine`): it moves tensors and knows no method. Names are imported when they are first
used: gRPC is an extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msfusion.engines.machine import on_this_machine
    from msfusion.engines.processes import Processes
    from msfusion.federated.engine import Engine, InProcess

_HOME_OF = {
    "Engine": "msfusion.federated.engine",
    "InProcess": "msfusion.federated.engine",
    "Processes": "msfusion.engines.processes",
    "on_this_machine": "msfusion.engines.machine",
}

__all__ = ["Engine", "InProcess", "Processes", "on_this_machine"]


def __getattr__(name: str) -> Any:
    """Import a name from its home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'msfusion.engines' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
