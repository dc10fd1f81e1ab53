"""What split learning reports: bytes by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msfusion.methods.split.wire import Message, Wire


@dataclass(frozen=True)
class SplitTraffic:
    """Bytes of one participant in one round: all that crosses, and its codecs' share of it.

    `activations` up and `gradients` down are what the codecs made of `plain_activations` and `plain_gradients`;
    `other_up` are the targets, masks and trained first layers, `other_down` the first layers that it received.
    """

    activations: int = 0
    gradients: int = 0
    plain_activations: int = 0
    plain_gradients: int = 0
    other_up: int = 0
    other_down: int = 0

    def crossed(self, wire: Wire, up: Message, down: Message, plain: int) -> SplitTraffic:
        """With a mini-batch that went up and came down, with `plain` bytes of activations before any codec."""
        return self.plus(
            activations=wire.coded_bytes(up),
            gradients=sum(map(len, down)),
            plain_activations=plain,
            plain_gradients=plain,
        )

    def plus(self, **more: int) -> SplitTraffic:
        """With more bytes of some kinds."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})


TRAFFIC = ("activations", "gradients", "plain_activations", "plain_gradients")
"""The kinds of bytes that a round's metrics tell, summed over the participants."""


def figures_of(traffic: Sequence[SplitTraffic]) -> dict[str, float | int]:
    """Those bytes, by the names that they have in the metrics."""
    return {f"{kind}_bytes": sum(getattr(each, kind) for each in traffic) for kind in TRAFFIC}
