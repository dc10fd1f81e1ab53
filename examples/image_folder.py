"""A network of your own on a folder of images, trained by participants none of whom holds more than half of its width.

    python examples/image_folder.py photos    # photos/cat/1.png, photos/dog/2.jpg: a folder for each class
    python examples/image_folder.py           # writes the built-in digits as such a folder, and takes that

It needs `pip install -e '.[data]'`, and a minute. What comes out is compared with the small model, which each
participant could have trained at the same cost; what the model makes of single images stands at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import msfusion
from msfusion.data import load_data
from msfusion.data.builtin import read_digits

PARTICIPANTS, RATIO, SIZE = 4, 0.5, 16


class Network(nn.Module):
    """Any module that torch.export can follow; nothing of it is written for msfusion."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.GroupNorm(32, 32)
        self.classify = nn.Linear(32 * (SIZE // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, channels, SIZE, SIZE] to logits [n, classes]."""
        hidden = nn.functional.max_pool2d(torch.relu(self.first(images)), 2)
        hidden = nn.functional.max_pool2d(torch.relu(self.norm(self.second(hidden))), 2)
        return self.classify(hidden.flatten(1))


def write_digits(folder: Path, count: int) -> None:
    """The first of the built-in digits as PNG files, folder/3/17.png for an image of a 3."""
    from PIL import Image

    images, labels = read_digits()
    for number, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(path)


def main(folder: Path | None = None, rounds: int = 40, count: int = 600) -> dict[str, float]:
    """Returns the accuracy on held-out images by method."""
    if folder is None:
        folder = Path("digits-as-images")
        write_digits(folder, count)
    # a fifth is held out as the test set, unless there are folders train and test
    data = load_data(msfusion.DataSpec(str(folder), participants=PARTICIPANTS, image_size=SIZE))
    print(data.description)
    channels = data.test.inputs[0].shape[1]
    accuracy = {}
    for method in (msfusion.Small(ratio=RATIO), msfusion.MSfusion(ratio=RATIO)):
        torch.manual_seed(0)
        federation = msfusion.Federation(
            Network(channels, data.classes),
            data,
            method=method,
            training=msfusion.Training("adamw", learning_rate=0.005, batch_size=16, local_epochs=2),
            evaluate_every=rounds,
        )
        federation.fit(rounds)
        accuracy[method.name] = federation.evaluate().accuracy
        print(
            f"{method.name}: {accuracy[method.name]:.1%} of the test images told rightly", *federation.remarks
        )

    # the trained model, with what it must know of images: their size, the spread of pixels, the names of classes
    predictor = msfusion.Predictor(federation.model(), data.preprocessing)
    some = sorted(path for path in folder.rglob("*.*") if path.is_file())[:: max(1, count // 5)]
    for each in predictor([str(path) for path in some]):
        print(f"{each.name}: {each.label}, with probability {each.probability:.0%}")
    return accuracy


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
