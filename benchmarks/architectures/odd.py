"""Wrappers, parametrizations, odd names and calls: what makes a model unlike its drawing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from architectures.entry import Architecture, Inputs, MakeInputs
from architectures.images import ResNet, images
from architectures.sequences import signal
from architectures.transformers_text import BERT, build, ids


def table(examples: int, length: int) -> Inputs:
    """Eight numbers."""
    return (torch.randn(examples, 8),)


def mlp() -> nn.Sequential:
    """A plain network."""
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


class Body(nn.Module):
    """Two layers with something between; subclasses say what."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(torch.tanh(self.first(x)))
        return self.last(torch.relu(self.second(h)))


class StarArgs(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self) -> None:
        super().__init__()
        self.module = ResNet()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Keywords(nn.Module):
    """A model that takes a batch as its collator gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build("DistilBertModel", **BERT, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
        self.head = nn.Linear(32, 5)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return {"logits": self.head((hidden * mask).sum(1) / mask.sum(1))}


def forward_hooks() -> nn.Module:
    """Hooks that change what goes into a module and what comes out."""
    model = Body()
    model.second.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.first.register_forward_hook(lambda module, args, out: out + 0.1 * out.pow(2))
    return model


class Symmetric(nn.Module):
    """A parametrization: a weight that is symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Positive(nn.Module):
    """A parametrization: a weight that is positive."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


def parametrized(name: str, how: nn.Module | Callable[..., Any]) -> nn.Module:
    """A body of which one layer's weight is made from another tensor."""
    model = Body()
    layer = getattr(model, name)
    if isinstance(how, nn.Module):
        parametrize.register_parametrization(layer, "weight", how)
    else:
        how(layer)
    return model


class ExtraState(Body):
    """State that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Tied(nn.Module):
    """An autoencoder that decodes with the transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner, self.outer = (
            nn.Parameter(0.2 * torch.randn(24, 8)),
            nn.Parameter(torch.zeros(24)),
            nn.Parameter(torch.zeros(8)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.sigmoid(F.linear(x, self.weight, self.inner))
        return F.linear(code, self.weight.t(), self.outer), code.mean()


class TwoNames(Body):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.again(h)))


class OddNames(nn.Module):
    """Containers in containers, with names that are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "a-b": nn.Linear(8, 24),
            "two words": nn.Linear(24, 24),
            'q"uote\\': nn.Linear(24, 24),
            "class": nn.Linear(24, 16),
        }
        self.parts = nn.ModuleList([nn.ModuleDict(layers), nn.ModuleList([nn.Sequential(nn.Linear(16, 4))])])
        self.scales = nn.ParameterDict(
            {"1st": nn.Parameter(torch.ones(24)), "for": nn.Parameter(torch.ones(24))}
        )
        self.offsets = nn.ParameterList([nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(4))])

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.parts[0].items():  # type: ignore[operator]
            x = torch.relu(layer(x))
            if name == "two words":
                x = x * self.scales["1st"] + self.scales["for"]
        return self.parts[1][0](x + self.offsets[0]) + self.offsets[1]  # type: ignore[index]


class SameName(nn.Module):
    """An input with the name of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(24, 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 24))
        self.scale: Tensor

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)) * self.scale * scale)


class LazyMask(nn.Module):
    """A mask that is made at the first call, and anew for another length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(24, 4)
        self.register_buffer("mask", None)
        self.mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return self.outer(self.mask @ torch.relu(self.inner(x)))


class Upsampled(nn.Module):
    """A segmentation network that answers in the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.two(torch.relu(self.one(x)))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class Answer(NamedTuple):
    """What a model returns by name."""

    logits: Tensor
    features: list[Tensor]


class Named(Body):
    """A named tuple with a list in it, and an argument that is no tensor."""

    def forward(self, x: Tensor, scale: float = 2.0, keep: bool = True) -> Answer:  # type: ignore[override]
        h = torch.tanh(self.first(x))
        return Answer(self.last(torch.relu(self.second(h)) * scale), [h.mean(1)] if keep else [])


class Autocast(Body):
    """Half precision within."""

    def between(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.second(h)
        return h.to(self.last.weight.dtype)


class Branches(Body):
    """A decision on a value."""

    def between(self, h: Tensor) -> Tensor:
        return h * 2 if h.sum() > 0 else h - 1


def renamed() -> nn.Module:
    """A hook that renames the state dict's tensors."""
    model = mlp()

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in list(state):
            state[f"model.{key}"] = state.pop(key)

    model._register_state_dict_hook(rename)
    return model


def lazy() -> nn.Module:
    """Lazy layers that a first call has made."""
    model = nn.Sequential(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    model(torch.randn(4, 8))
    return model


def on_meta() -> nn.Module:
    """A model without values: what is planned before it is made."""
    with torch.device("meta"):
        return mlp()


def scaled(examples: int, length: int) -> Inputs:
    """Numbers, and a scale for each example."""
    return (torch.randn(examples, 8), torch.rand(examples, 1))


def with_a_number(examples: int, length: int) -> Inputs:
    """Numbers, and an argument that is no tensor."""
    return {"x": torch.randn(examples, 8), "scale": 1.5}


def odd(
    name: str,
    style: str,
    model: Callable[[], nn.Module],
    inputs: MakeInputs = table,
    lengths: tuple[int, ...] = (),
    length: int = 8,
    answer: str | None = None,
) -> Architecture:
    return Architecture(
        name, "tuning, wrappers and odd training", style, model, inputs, length, lengths, answer
    )


ODD = [
    odd("star-args", "forward(*args, **kwargs)", StarArgs, images),
    odd("keyword-batch", "forward(**batch) around a transformers encoder", Keywords, ids, (6, 11)),
    odd("data-parallel", "nn.DataParallel", lambda: nn.DataParallel(ResNet()), images),
    odd("compiled", "torch.compile", lambda: torch.compile(mlp(), backend="eager")),  # type: ignore[arg-type, return-value]
    odd("averaged", "swa_utils.AveragedModel", lambda: torch.optim.swa_utils.AveragedModel(mlp())),
    odd("scripted", "torch.jit.script", lambda: torch.jit.script(mlp())),  # type: ignore[no-untyped-call]
    odd("forward-hooks", "hooks that change inputs and outputs", forward_hooks),
    odd("parametrization", "softplus of a weight", lambda: parametrized("second", Positive())),
    odd("symmetric", "a symmetric weight by triu", lambda: parametrized("second", Symmetric())),
    odd("orthogonal", "parametrizations.orthogonal", lambda: parametrized("second", parametrizations.orthogonal)),
    odd("spectral-norm", "parametrizations.spectral_norm",
        lambda: parametrized("second", parametrizations.spectral_norm)),
    odd("spectral-norm-old", "nn.utils.spectral_norm", lambda: parametrized("second", nn.utils.spectral_norm)),
    odd("weight-norm", "parametrizations.weight_norm", lambda: parametrized("second", parametrizations.weight_norm)),
    odd("weight-norm-old", "nn.utils.weight_norm", lambda: parametrized("second", nn.utils.weight_norm)),
    odd("extra-state", "get_extra_state", ExtraState),
    odd("renamed-state", "a state-dict hook that renames", renamed),
    odd("tied-autoencoder", "one weight and its transpose", Tied),
    odd("two-names", "one module under two names", TwoNames),
    odd("odd-names", "quotes, blanks and keywords in names", OddNames),
    odd("lazy-layers", "Lazy modules after their first call", lazy),
    odd("meta-device", "no values yet", on_meta),
    odd("same-name", "an input named like a buffer", SameName, scaled),
    odd("lazy-mask", "a buffer that is None until the first call", LazyMask, signal, (6, 11)),
    odd("segmentation", "interpolate to the input's size", Upsampled,
         lambda examples, length: (torch.randn(examples, 3, length, length),), (12, 24), 16),
    odd("named-tuple", "a list within a named tuple, a float argument", Named, with_a_number),
    odd("autocast", "bfloat16 within forward", Autocast),
    odd("value-branch", "if x.sum() > 0", Branches),
]  # fmt: skip
