"""Wrappers, gradients of the user's own, state that changes, names that are odd: what makes a model unlike its drawing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from architectures.entry import Architecture, Inputs, MakeInputs
from architectures.images import ResNet, images
from architectures.sequences import WORDS, NanoGPT, signal, translated, words
from architectures.transformers_senses import WAV, sound
from architectures.transformers_text import BERT, BART, GPT, build, ids, pairs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint


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


class Checkpointed(Body):
    """The second layer is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = checkpoint(lambda y: torch.relu(self.second(y)), h, use_reentrant=False)
        return self.last(h)


class Sign(torch.autograd.Function):
    """The sign, with the gradient of the identity within one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1).to(gradient.dtype)


class Binary(Body):
    """A binary network: straight-through by an autograd function."""

    def between(self, h: Tensor) -> Tensor:
        result: Tensor = Sign.apply(h)
        return result


class DetachedRound(Body):
    """Straight-through by detach: fake quantisation to eight levels."""

    def between(self, h: Tensor) -> Tensor:
        return h + (torch.round(h * 4) / 4 - h).detach()


class Reverse(torch.autograd.Function):
    """The identity, with the gradient reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.strength * gradient, None


class DomainAdversarial(Body):
    """DANN: a second head behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = torch.tanh(self.first(x))
        return self.last(torch.relu(self.second(h))), self.domain(Reverse.apply(h, 0.5))


class TensorHook(Body):
    """A hook that makes a gradient smaller."""

    def between(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: 0.1 * gradient)
        return h


def module_hook() -> nn.Module:
    """A hook on a module's gradient."""
    model = Body()
    model.second.register_full_backward_hook(
        lambda module, given, out: tuple(None if g is None else 2 * g for g in given)
    )
    return model


def parameter_hook() -> nn.Module:
    """A hook that masks a parameter's gradient."""
    model = Body()
    model.second.weight.register_hook(lambda gradient: gradient * (torch.arange(24) % 2).to(gradient.dtype))
    return model


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


class LayerDrop(nn.Module):
    """Whole layers are dropped by a coin of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 4)
        self.layers, self.survival = nn.ModuleList(nn.Linear(24, 24) for _ in range(3)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.training and torch.rand([]) > self.survival:
                continue
            x = x + torch.relu(layer(x))
        return self.last(x)


class StochasticDepth(LayerDrop):
    """Whole layers are dropped by a coin of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if not self.training or random.random() < self.survival:
                x = x + torch.relu(layer(x))
        return self.last(x)


class DropPath(LayerDrop):
    """Stochastic depth for each example, as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            y = torch.relu(layer(x))
            if self.training:
                y = y.div(self.survival) * x.new_empty(x.shape[0], 1).bernoulli_(self.survival)
            x = x + y
        return self.last(x)


class Annealed(Body):
    """A temperature that falls with each call in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, h: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.tanh(h * (1 + 0.1 * self.calls))


class TeacherForcing(nn.Module):
    """The decoder of the seq2seq tutorial: at each step a coin says whether the answer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 16), nn.Embedding(WORDS, 16)
        self.encoder, self.decoder, self.head = (
            nn.GRU(16, 24, batch_first=True),
            nn.GRUCell(16, 24),
            nn.Linear(24, WORDS),
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = self.encoder(self.source(source))[1][0]
        word, answers = target[:, 0], []
        for t in range(target.size(1)):
            h = self.decoder(self.target(word), h)
            answers.append(self.head(h))
            given = random.random() < 0.5 and self.training
            word = target[:, t] if given else answers[-1].argmax(1)
        return torch.stack(answers, 1)


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


class Ema(Body):
    """A moving average in a buffer, and a count of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.mean: Tensor
        self.steps: Tensor

    def between(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
                self.steps += 1
        return h - self.mean


class Assigned(Ema):
    """A moving average that is assigned."""

    def between(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.steps = self.steps + 1
        return h - self.mean


class Codebook(Body):
    """VQ-VAE: the nearest code, straight through, with codes that follow by moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 24))
        self.register_buffer("counts", torch.ones(6))
        self.codes: Tensor
        self.counts: Tensor

    def between(self, h: Tensor) -> Tensor:
        index = torch.cdist(h, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                chosen = F.one_hot(index, 6).to(h.dtype)
                self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.codes.mul_(0.9).add_(0.1 * (chosen.t() @ h) / self.counts[:, None])
        return h + (F.embedding(index, self.codes) - h).detach()


class MaxNorm(nn.Linear):
    """EEGNet's layer: its rows are never longer than a bound."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.25))
        return super().forward(x)


def max_norm() -> nn.Module:
    """A network with a bound on its weights."""
    return nn.Sequential(MaxNorm(8, 24), nn.ReLU(), nn.Linear(24, 4))


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


class HalfwayGumbel(Body):
    """A categorical choice that is drawn, straight through."""

    def between(self, h: Tensor) -> Tensor:
        choice = (
            F.gumbel_softmax(h.view(-1, 4, 6), tau=0.7, hard=True)
            if self.training
            else h.view(-1, 4, 6).softmax(-1)
        )
        return choice.reshape(h.shape)


class Branches(Body):
    """A decision on a value."""

    def between(self, h: Tensor) -> Tensor:
        return h * 2 if h.sum() > 0 else h - 1


class MomentumTeacher(nn.Module):
    """BYOL: what a frozen copy of the encoder says is predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = mlp(), nn.Linear(4, 4)
        self.target = mlp().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.target(x)
        return 2 - 2 * F.cosine_similarity(self.predictor(self.online(x)), goal, dim=-1)


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


def norms() -> nn.Module:
    """Norms whose statistics are kept in unusual ways."""
    return nn.Sequential(
        nn.Conv1d(8, 16, 1), nn.InstanceNorm1d(16, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv1d(16, 24, 1),
        nn.BatchNorm1d(24, momentum=None), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def checkpointed_gpt2() -> nn.Module:
    """GPT-2 with gradient checkpointing switched on."""
    model = build("GPT2LMHeadModel", **GPT)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model


def labelled(examples: int, length: int) -> Inputs:
    """Texts with their labels, in a tokenizer's order."""
    given = pairs(examples, length)
    assert isinstance(given, dict)
    return given | {"labels": torch.randint(0, 3, (examples,))}


def language(examples: int, length: int) -> Inputs:
    """Texts that are their own labels."""
    given = ids(examples, length)
    assert isinstance(given, dict)
    return given | {"labels": given["input_ids"].clone()}


def ended(examples: int, length: int) -> Inputs:
    """Texts that end with a word of their own."""
    return {"input_ids": F.pad(torch.randint(3, 95, (examples, length - 1)), (0, 1), value=95)}


def scaled(examples: int, length: int) -> Inputs:
    """Numbers, and a scale for each example."""
    return (torch.randn(examples, 8), torch.rand(examples, 1))


def with_a_number(examples: int, length: int) -> Inputs:
    """Numbers, and an argument that is no tensor."""
    return {"x": torch.randn(examples, 8), "scale": 1.5}


def channels(examples: int, length: int) -> Inputs:
    """Eight channels over time."""
    return (torch.randn(examples, 8, length),)


def _odd(
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
    _odd("star-args", "forward(*args, **kwargs)", StarArgs, images),
    _odd("keyword-batch", "forward(**batch) around a transformers encoder", Keywords, ids, (6, 11)),
    _odd("data-parallel", "nn.DataParallel", lambda: nn.DataParallel(ResNet()), images),
    _odd("compiled", "torch.compile", lambda: torch.compile(mlp(), backend="eager")),  # type: ignore[arg-type, return-value]
    _odd("averaged", "swa_utils.AveragedModel", lambda: torch.optim.swa_utils.AveragedModel(mlp())),
    _odd("scripted", "torch.jit.script", lambda: torch.jit.script(mlp())),  # type: ignore[no-untyped-call]
    _odd("checkpointed", "activation checkpointing", Checkpointed),
    _odd("checkpointed-gpt2", "gradient_checkpointing_enable", checkpointed_gpt2, ids, (6, 11)),
    _odd("labels-inside", "BERT that returns its loss", lambda: build("BertForSequenceClassification", **BERT), labelled),
    _odd("shifted-labels", "GPT-2 that returns its loss", lambda: build("GPT2LMHeadModel", **GPT), language, (6, 11)),
    _odd("straight-through", "autograd.Function: sign", Binary),
    _odd("straight-through-detach", "x + (round(x) - x).detach()", DetachedRound),
    _odd("gradient-reversal", "autograd.Function: reversed gradient (DANN)", DomainAdversarial),
    _odd("tensor-hook", "register_hook on an activation", TensorHook),
    _odd("module-hook", "register_full_backward_hook", module_hook),
    _odd("parameter-hook", "register_hook on a parameter", parameter_hook),
    _odd("forward-hooks", "hooks that change inputs and outputs", forward_hooks),
    _odd("parametrization", "softplus of a weight", lambda: parametrized("second", Positive())),
    _odd("symmetric", "a symmetric weight by triu", lambda: parametrized("second", Symmetric())),
    _odd("orthogonal", "parametrizations.orthogonal", lambda: parametrized("second", parametrizations.orthogonal)),
    _odd("spectral-norm", "parametrizations.spectral_norm", lambda: parametrized("second", parametrizations.spectral_norm)),
    _odd("spectral-norm-old", "nn.utils.spectral_norm", lambda: parametrized("second", nn.utils.spectral_norm)),
    _odd("weight-norm", "parametrizations.weight_norm", lambda: parametrized("second", parametrizations.weight_norm)),
    _odd("weight-norm-old", "nn.utils.weight_norm", lambda: parametrized("second", nn.utils.weight_norm)),
    _odd("layer-drop", "a coin of torch's for each layer", LayerDrop),
    _odd("stochastic-depth", "a coin of Python's for each layer", StochasticDepth),
    _odd("drop-path", "stochastic depth for each example", DropPath),
    _odd("annealing", "a counter that is an attribute", Annealed),
    _odd("teacher-forcing", "a coin of Python's at each step", TeacherForcing, translated, (6, 11)),
    _odd("spec-augment", "Wav2Vec2 that masks time by NumPy",
         lambda: build("Wav2Vec2ForSequenceClassification", **WAV | {"apply_spec_augment": True, "mask_time_length": 2,
                                                                     "mask_time_prob": 0.3}), sound, (48,), 64),
    _odd("bart-layerdrop", "BART with LayerDrop in its configuration",
         lambda: build("BartForSequenceClassification", **BART | {"encoder_layerdrop": 0.2, "num_labels": 3,
                                                                  "eos_token_id": 95}), ended, (6, 11), 8, "logits"),
    _odd("extra-state", "get_extra_state", ExtraState),
    _odd("renamed-state", "a state-dict hook that renames", renamed),
    _odd("tied-autoencoder", "one weight and its transpose", Tied),
    _odd("two-names", "one module under two names", TwoNames),
    _odd("odd-names", "quotes, blanks and keywords in names", OddNames),
    _odd("lazy-layers", "Lazy modules after their first call", lazy),
    _odd("meta-device", "no values yet", on_meta),
    _odd("ema-buffer", "moving averages in place under no_grad", Ema),
    _odd("assigned-buffer", "moving averages by assignment", Assigned),
    _odd("vq-codebook", "nearest code, moving averages", Codebook),
    _odd("max-norm", "weights bounded in place in forward", max_norm),
    _odd("odd-norms", "InstanceNorm with statistics, BatchNorm with momentum=None", norms, channels, (6, 11)),
    _odd("same-name", "an input named like a buffer", SameName, scaled),
    _odd("lazy-mask", "a buffer that is None until the first call", LazyMask, signal, (6, 11)),
    _odd("segmentation", "interpolate to the input's size", Upsampled,
         lambda examples, length: (torch.randn(examples, 3, length, length),), (12, 24), 16),
    _odd("named-tuple", "a list within a named tuple, a float argument", Named, with_a_number),
    _odd("autocast", "bfloat16 within forward", Autocast),
    _odd("gumbel-softmax", "a drawn choice, straight through", HalfwayGumbel),
    _odd("value-branch", "if x.sum() > 0", Branches),
    _odd("momentum-teacher", "a frozen copy under no_grad (BYOL)", MomentumTeacher),
    _odd("sparse-embedding", "nn.Embedding(sparse=True)",
         lambda: nn.Sequential(nn.Embedding(WORDS, 24, sparse=True), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)), words),
    _odd("loss-of-nanogpt", "targets beside inputs, cross-entropy within", NanoGPT,
         lambda examples, length: {"targets": torch.randint(0, WORDS, (examples, length)),
                                   "idx": torch.randint(0, WORDS, (examples, length))}, (6, 11)),
]  # fmt: skip
