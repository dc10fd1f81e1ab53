"""Activations of a trained network for `codec.py`: a small convolutional one, trained on CIFAR-10 and kept on disk."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec

BATCH = 256
EXAMPLES = 20_000
EPOCHS = 3


class Stages(nn.Module):
    """Three stages of 64, 128 and 256 channels at 32, 16 and 8 pixels, each ending in a ReLU where one would cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_stage(3, 64, 1), _stage(64, 128, 2), _stage(128, 256, 2)])
        self.classify = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.classify(self.activations(images)[-1].mean((2, 3)))

    def activations(self, images: Tensor) -> list[Tensor]:
        """What crosses a cut after each stage."""
        found = []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def trained_activations(data: Path, cache: Path) -> tuple[list[Tensor], float]:
    """Three activations of 256 test images, float32, and the network's accuracy on 2,000; from `cache` if there."""
    file = cache / "codec_activations.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_train(data), file)
    kept = torch.load(file, weights_only=True)
    return kept["activations"], kept["accuracy"]


def _train(data: Path) -> dict[str, object]:
    spec = DataSpec(str(data), max_train=EXAMPLES, max_test=2000, participants=1, partition="iid")
    loaded = load_data(spec)
    images, labels = loaded.participants[0].inputs[0], loaded.participants[0].targets
    torch.manual_seed(0)
    model = Stages()
    steps = EPOCHS * (len(labels) // 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        test_images, test_labels = loaded.test.inputs[0], loaded.test.targets
        right = [
            (model(batch).argmax(1) == batch_labels).sum()
            for batch, batch_labels in zip(test_images.split(500), test_labels.split(500), strict=True)
        ]
        activations = [part.clone() for part in model.activations(test_images[:BATCH])]
    return {"activations": activations, "accuracy": float(sum(right)) / len(test_labels)}
