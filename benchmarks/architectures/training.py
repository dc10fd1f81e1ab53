"""Gradients of the user's own, coins, state that changes in training, losses within the model."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from architectures.entry import Inputs
from architectures.odd import Body, mlp, odd
from architectures.sequences import WORDS, NanoGPT, translated, words
from architectures.transformers_senses import WAV, sound
from architectures.transformers_text import BART, BERT, GPT, build, ids, pairs


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


class HalfwayGumbel(Body):
    """A categorical choice that is drawn, straight through."""

    def between(self, h: Tensor) -> Tensor:
        choice = (
            F.gumbel_softmax(h.view(-1, 4, 6), tau=0.7, hard=True)
            if self.training
            else h.view(-1, 4, 6).softmax(-1)
        )
        return choice.reshape(h.shape)


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


def norms() -> nn.Module:
    """Norms whose statistics are kept in unusual ways."""
    return nn.Sequential(
        nn.Conv1d(8, 16, 1), nn.InstanceNorm1d(16, affine=True, track_running_stats=True), nn.ReLU(),
        nn.Conv1d(16, 24, 1),
        nn.BatchNorm1d(24, momentum=None), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def channels(examples: int, length: int) -> Inputs:
    """Eight channels over time."""
    return (torch.randn(examples, 8, length),)


TRAINING = [
    odd("checkpointed", "activation checkpointing", Checkpointed),
    odd("checkpointed-gpt2", "gradient_checkpointing_enable", checkpointed_gpt2, ids, (6, 11)),
    odd("labels-inside", "BERT that returns its loss",
        lambda: build("BertForSequenceClassification", **BERT), labelled),
    odd("shifted-labels", "GPT-2 that returns its loss", lambda: build("GPT2LMHeadModel", **GPT), language, (6, 11)),
    odd("straight-through", "autograd.Function: sign", Binary),
    odd("straight-through-detach", "x + (round(x) - x).detach()", DetachedRound),
    odd("gradient-reversal", "autograd.Function: reversed gradient (DANN)", DomainAdversarial),
    odd("tensor-hook", "register_hook on an activation", TensorHook),
    odd("module-hook", "register_full_backward_hook", module_hook),
    odd("parameter-hook", "register_hook on a parameter", parameter_hook),
    odd("layer-drop", "a coin of torch's for each layer", LayerDrop),
    odd("stochastic-depth", "a coin of Python's for each layer", StochasticDepth),
    odd("drop-path", "stochastic depth for each example", DropPath),
    odd("annealing", "a counter that is an attribute", Annealed),
    odd("teacher-forcing", "a coin of Python's at each step", TeacherForcing, translated, (6, 11)),
    odd("spec-augment", "Wav2Vec2 that masks time by NumPy",
         lambda: build("Wav2Vec2ForSequenceClassification", **WAV | {"apply_spec_augment": True, "mask_time_length": 2,
                                                                     "mask_time_prob": 0.3}), sound, (48,), 64),
    odd("bart-layerdrop", "BART with LayerDrop in its configuration",
         lambda: build("BartForSequenceClassification", **BART | {"encoder_layerdrop": 0.2, "num_labels": 3,
                                                                  "eos_token_id": 95}), ended, (6, 11), 8, "logits"),
    odd("ema-buffer", "moving averages in place under no_grad", Ema),
    odd("assigned-buffer", "moving averages by assignment", Assigned),
    odd("vq-codebook", "nearest code, moving averages", Codebook),
    odd("max-norm", "weights bounded in place in forward", max_norm),
    odd("odd-norms", "InstanceNorm with statistics, BatchNorm with momentum=None", norms, channels, (6, 11)),
    odd("gumbel-softmax", "a drawn choice, straight through", HalfwayGumbel),
    odd("momentum-teacher", "a frozen copy under no_grad (BYOL)", MomentumTeacher),
    odd("sparse-embedding", "nn.Embedding(sparse=True)",
         lambda: nn.Sequential(nn.Embedding(WORDS, 24, sparse=True), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)),
        words),
    odd("loss-of-nanogpt", "targets beside inputs, cross-entropy within", NanoGPT,
         lambda examples, length: {"targets": torch.randint(0, WORDS, (examples, length)),
                                   "idx": torch.randint(0, WORDS, (examples, length))}, (6, 11)),
]  # fmt: skip
