"""A federation written out by hand: ten participants, each with a quarter of the width, train one model of your own.

Run with `python examples/own_loop.py`. Everything msfusion does is in `trace`, `double_shift`, `narrow` and `fuse`; the
command line adds processes, resuming and reports.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import msfusion
from msfusion.data.builtin import read_digits

PARTICIPANTS, RATIO = 10, 0.25


def network() -> nn.Module:
    """Any module that torch.export can follow."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(64, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in 0..1 and their labels."""
    return read_digits()


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What a participant does with its sub-model: some epochs of its own training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(4):
        for chosen in torch.randperm(len(labels)).split(16):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(rounds: int = 15) -> float:
    """Returns the fused model's accuracy on held-out images."""
    torch.manual_seed(0)
    images, labels = digits()
    test, own = slice(0, 360), [slice(start, None, PARTICIPANTS) for start in range(360, 360 + PARTICIPANTS)]
    model = network()
    width_map = msfusion.trace(model, (images[:2],))
    accuracy = 0.0
    for round_index in range(rounds):
        updates = []
        for participant in range(PARTICIPANTS):
            window = msfusion.double_shift(
                width_map, participant, round_index, RATIO, participants=PARTICIPANTS
            )
            sub_model = msfusion.narrow(model, width_map, window)
            train(sub_model, images[own[participant]], labels[own[participant]])
            updates.append((window, sub_model.state_dict(), 1.0))
        model.load_state_dict(msfusion.fuse(model.state_dict(), width_map, updates))
        with torch.no_grad():
            accuracy = float((model(images[test]).argmax(1) == labels[test]).double().mean())
        print(f"round {round_index + 1}: accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
