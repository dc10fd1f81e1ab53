"""Networks for texts and other sequences, written by hand as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture, Inputs, MakeInputs

WORDS = 40


def words(examples: int, length: int) -> Inputs:
    """Texts as numbers of their words."""
    return (torch.randint(1, WORDS, (examples, length)),)


def signal(examples: int, length: int) -> Inputs:
    """Eight features over time."""
    return (torch.randn(examples, length, 8),)


def waves(examples: int, length: int) -> Inputs:
    """One channel over time."""
    return (torch.randn(examples, 1, length),)


def lengths(examples: int, length: int) -> Inputs:
    """Sequences, and how long each is."""
    return {
        "x": torch.randn(examples, length, 8),
        "lengths": torch.tensor([length, *[length - 2] * (examples - 1)]),
    }


def translated(examples: int, length: int) -> Inputs:
    """Texts, and answers that are one word shorter, by keyword in the other order."""
    return {
        "target": torch.randint(1, WORDS, (examples, length - 1)),
        "source": torch.randint(1, WORDS, (examples, length)),
    }


class CausalSelfAttention(nn.Module):
    """nanoGPT's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTBlock(nn.Module):
    """nanoGPT's block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            CausalSelfAttention(width, heads),
        )
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT with its tied head; with targets it returns the loss, too."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(WORDS, 32), "wpe": nn.Embedding(64, 32), "drop": nn.Dropout(0.1),
            "h": nn.ModuleList([GPTBlock(32, 4), GPTBlock(32, 4)]), "ln_f": nn.LayerNorm(32),
        })  # fmt: skip
        self.lm_head = nn.Linear(32, WORDS, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](pos))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class RMSNorm(nn.Module):
    """Llama's norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on halves."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class LlamaBlock(nn.Module):
    """Rotary positions, grouped queries, and a gated MLP."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, shared * self.size, bias=False)
        self.wv = nn.Linear(width, shared * self.size, bias=False)
        self.w1, self.w3 = nn.Linear(width, 48, bias=False), nn.Linear(width, 48, bias=False)
        self.w2 = nn.Linear(48, width, bias=False)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q = rotate(self.wq(y).view(b, t, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.wk(y).view(b, t, self.shared, self.size).transpose(1, 2), cos, sin)
        v = self.wv(y).view(b, t, self.shared, self.size).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.shared, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class LlamaLike(nn.Module):
    """A Llama with rotary tables that are not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = (
            nn.Embedding(WORDS, 32),
            RMSNorm(32),
            nn.Linear(32, WORDS, bias=False),
        )
        self.layers = nn.ModuleList([LlamaBlock(32, 4, 2), LlamaBlock(32, 4, 2)])
        angles = torch.outer(torch.arange(64).float(), 10000 ** -(torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return self.head(self.norm(x))


class EinsumAttention(nn.Module):
    """Attention with one weight tensor for each role, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 24)
        self.q, self.k, self.v = (nn.Parameter(0.2 * torch.randn(24, 4, 6)) for _ in range(3))
        self.o, self.norm, self.head = (
            nn.Parameter(0.2 * torch.randn(4, 6, 24)),
            nn.LayerNorm(24),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (torch.einsum("btd,dhe->bhte", self.norm(x), w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqe,bhke->bhqk", q, k).div(6**0.5).softmax(-1)
        return self.head((x + torch.einsum("bhqk,bhke,hed->bqd", weights, v, self.o)).mean(1))


class TorchTransformer(nn.Module):
    """nn.TransformerEncoder with sine positions and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32, padding_idx=0), nn.Linear(32, 5)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        angles = torch.arange(64)[:, None] * torch.exp(torch.arange(0, 32, 2) * (-math.log(10000.0) / 32))
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.pe: Tensor

    def forward(self, src: Tensor) -> Tensor:
        x = self.embed(src) * math.sqrt(32) + self.pe[: src.size(1)]
        return self.head(self.encoder(x, src_key_padding_mask=src == 0).mean(dim=1))


class Translator(nn.Module):
    """nn.Transformer with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = (
            nn.Embedding(WORDS, 32),
            nn.Embedding(WORDS, 32),
            nn.Linear(32, WORDS),
        )
        self.core = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=self.head.weight.dtype)
        return self.head(self.core(self.source(source), self.target(target), tgt_mask=mask))


class Recurrent(nn.Module):
    """A recurrent layer and the last state."""

    def __init__(self, kind: Callable[..., nn.Module], **more: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 24, batch_first=True, **more), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Packed(nn.Module):
    """An LSTM on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = (
            nn.LSTM(8, 24, 2, batch_first=True, bidirectional=True, dropout=0.2),
            nn.Linear(48, 5),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (h, _) = self.rnn(packed)
        return self.head(torch.cat([h[-2], h[-1]], 1))


class Cells(nn.Module):
    """A loop over time with a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), 24)
        answers = []
        for t in range(x.size(1)):
            h, c = self.cell(x[:, t], (h, c))
            answers.append(self.head(h))
        return torch.stack(answers, 1)


class CharRNN(nn.Module):
    """A GRU language model that takes and returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.fc = (
            nn.Embedding(WORDS, 16),
            nn.GRU(16, 24, 2, batch_first=True),
            nn.Linear(24, WORDS),
        )

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, hidden = self.gru(self.embed(x), hidden)
        return self.fc(out), hidden


class Attended(nn.Module):
    """An encoder and a decoder with Bahdanau's attention, all answers given (teacher forcing at 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 16), nn.Embedding(WORDS, 16)
        self.encoder, self.decoder = nn.GRU(16, 24, batch_first=True), nn.GRU(40, 24, batch_first=True)
        self.w, self.u, self.v, self.head = (
            nn.Linear(24, 20),
            nn.Linear(24, 20),
            nn.Linear(20, 1),
            nn.Linear(24, WORDS),
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states, h = self.encoder(self.source(source))
        answers = []
        for t in range(target.size(1)):
            score = self.v(torch.tanh(self.w(states) + self.u(h[-1])[:, None])).squeeze(-1)
            context = torch.bmm(score.softmax(1).unsqueeze(1), states)
            out, h = self.decoder(torch.cat([self.target(target[:, t : t + 1]), context], -1), h)
            answers.append(self.head(out))
        return torch.cat(answers, 1)


class TemporalBlock(nn.Module):
    """A causal convolution with weight norm, as the TCN's authors cut it."""

    def __init__(self, inner: int, outer: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        self.conv = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(inner, outer, 3, padding=2 * dilation, dilation=dilation)
        )
        self.down = nn.Conv1d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv(x)[:, :, : -self.cut].contiguous())
        return F.relu(out + (x if self.down is None else self.down(x)))


class TCN(nn.Module):
    """A temporal convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = (
            nn.Sequential(*(TemporalBlock(i, 16, d) for i, d in ((1, 1), (16, 2), (16, 4)))),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions whose skips are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end1, self.end2 = nn.Conv1d(1, 16, 1), nn.Conv1d(12, 12, 1), nn.Conv1d(12, 10, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(3))
        self.res = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(16, 12, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), 0
        for i, (gate, res, skip) in enumerate(zip(self.gates, self.res, self.skip, strict=True)):
            filtered, gated = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            z = torch.tanh(filtered) * torch.sigmoid(gated)
            skips, x = skips + skip(z), x + res(z)
        return self.end2(F.relu(self.end1(F.relu(skips))))


class TextCNN(nn.Module):
    """Convolutions of several widths over words, each with its maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.convs = nn.ModuleList([nn.Conv2d(1, 12, (k, 16)) for k in (2, 3, 4)])
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        parts = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(self.drop(torch.cat([F.max_pool1d(p, p.size(2)).squeeze(2) for p in parts], 1)))


class FastText(nn.Module):
    """A bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(WORDS, 24, mode="sum"), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bag(x))


class LinearAttention(nn.Module):
    """Attention without softmax, in linear time, normalised by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (
            nn.Embedding(WORDS, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.transpose(-2, -1) @ v
        norm = 1 / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return self.head(x + self.out(((q @ state) * norm).transpose(1, 2).flatten(2)))


class StateSpace(nn.Module):
    """A diagonal state-space layer whose kernel is made by FFT (S4D)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.skip = nn.Linear(8, 16), nn.Linear(16, 5), nn.Parameter(torch.randn(16))
        self.decay, self.turn = nn.Parameter(torch.rand(16, 4)), nn.Parameter(torch.randn(16, 4))
        self.mix = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inp(x).transpose(1, 2)
        time = torch.arange(u.size(-1), device=u.device)
        kernel = torch.exp(-self.decay.exp()[..., None] * time) * torch.cos(self.turn[..., None] * time)
        kernel = torch.einsum("hn,hnt->ht", self.mix, kernel)
        size = 2 * u.size(-1)
        y = torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(kernel, n=size), n=size)[
            ..., : u.size(-1)
        ]
        return self.out(F.gelu(y + u * self.skip[:, None]).transpose(1, 2))


class Conformer(nn.Module):
    """Half an MLP, attention, a gated convolution, half an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 32)
        self.one = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
        self.two = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.gate, self.depth = nn.Conv1d(32, 64, 1), nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.batch, self.point, self.head = nn.BatchNorm1d(32), nn.Conv1d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + 0.5 * self.one(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.depth(F.glu(self.gate(x.transpose(1, 2)), dim=1))
        x = x + self.point(F.silu(self.batch(y))).transpose(1, 2)
        return self.head(x + 0.5 * self.two(x))


class Siamese(nn.Module):
    """Two texts through one tower, compared by cosine and by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.out = (
            nn.Embedding(WORDS, 16),
            nn.GRU(16, 24, batch_first=True),
            nn.Linear(24, 12),
        )

    def tower(self, x: Tensor) -> Tensor:
        return F.normalize(self.out(self.gru(self.embed(x))[0].mean(1)), dim=-1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.tower(first), self.tower(second)
        return F.cosine_similarity(a, b), F.pairwise_distance(a, b)


def two_texts(examples: int, length: int) -> Inputs:
    """Two texts."""
    return (torch.randint(1, WORDS, (examples, length)), torch.randint(1, WORDS, (examples, length)))


def _sequence(
    name: str,
    style: str,
    model: Callable[[], nn.Module],
    inputs: MakeInputs,
    length: int = 8,
    answer: int | None = None,
) -> Architecture:
    return Architecture(name, "hand-written", style, model, inputs, length, (length - 2, length + 4), answer)


SEQUENCES = [
    _sequence("nanogpt", "tied head, mask in a buffer, returns a None", NanoGPT, words),
    _sequence("llama-like", "rotary positions, grouped queries, RMSNorm by hand", LlamaLike, words),
    _sequence("einsum-attention", "one weight tensor of three axes for each role", EinsumAttention, words),
    _sequence("torch-transformer", "nn.TransformerEncoder, padding mask", TorchTransformer, words),
    _sequence("torch-translator", "nn.Transformer; keywords in another order than forward's", Translator, translated),
    _sequence("linear-attention", "unflatten, products in another order", LinearAttention, words),
    _sequence("rnn", "nn.RNN, last state", lambda: Recurrent(nn.RNN), signal),
    _sequence("lstm", "nn.LSTM of two layers", lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.1), signal),
    _sequence("lstm-projection", "nn.LSTM with proj_size", lambda: Recurrent(
        lambda *a, **k: nn.LSTM(8, 48, proj_size=24, batch_first=True)), signal),
    _sequence("lstm-packed", "packed sequences, both directions", Packed, lengths),
    _sequence("lstm-cells", "a Python loop over time", Cells, signal),
    _sequence("gru-language-model", "takes and returns its state", CharRNN, words, answer=0),
    _sequence("seq2seq-attention", "Bahdanau's attention in a loop over the answer", Attended, translated),
    _sequence("tcn", "dilated causal convolutions, weight norm", TCN, waves, 16),
    _sequence("wavenet", "gated convolutions, summed skips", WaveNet, waves, 16),
    _sequence("text-cnn", "kernels over whole words, maximum over time", TextCNN, words),
    _sequence("fasttext", "EmbeddingBag with a sum", FastText, words),
    _sequence("state-space-by-hand", "a kernel by FFT (S4D)", StateSpace, signal),
    _sequence("conformer-by-hand", "attention and gated convolution", Conformer, signal),
    _sequence("siamese-texts", "one tower twice, cosine and distance", Siamese, two_texts),
]  # fmt: skip
