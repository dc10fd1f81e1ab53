"""A multilayer perceptron: for tables and lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from msfusion.errors import ConfigError


class MLP(nn.Module):
    """Layers of units with ReLU between them, and a linear one at the end.

    `in_features` numbers of an example (axes after the first are joined), `hidden` units of each layer, `classes`
    outputs. Raises ConfigError for a layer without units.
    """

    def __init__(self, in_features: int, classes: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        if any(units < 1 for units in hidden):
            raise ConfigError(f"model.options.hidden = {list(hidden)} must be numbers of units, above 0.")
        layers: list[nn.Module] = [nn.Flatten()]
        for units in hidden:
            layers += [nn.Linear(in_features, units), nn.ReLU()]
            in_features = units
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(in_features, classes)

    def forward(self, inputs: Float[Tensor, "examples ..."]) -> Float[Tensor, "examples classes"]:
        """Logits, or the numbers that are predicted."""
        logits: Tensor = self.head(self.layers(inputs))
        return logits
