"""Transformers written by hand in the nanoGPT manner: head counts and sizes are numbers in `forward`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, tokens


class CausalAttention(nn.Module):
    """nanoGPT's attention: one projection for query, key and value, split and viewed by configured sizes."""

    def __init__(self, width: int, heads: int, *, fused: bool, block: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.n_head, self.n_embd, self.fused = heads, width, fused
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class NanoGPT(nn.Module):
    """nanoGPT: learned positions, pre-norm blocks, the head tied to the embedding; returns no loss."""

    def __init__(
        self, width: int = 24, heads: int = 3, vocab: int = 50, *, fused: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(vocab, width), nn.Embedding(32, width), nn.Dropout(0.1)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width, bias=bias),
                    "attn": CausalAttention(width, heads, fused=fused, bias=bias),
                    "ln_2": nn.LayerNorm(width, bias=bias),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(2)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(width, bias=bias), nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = idx.size()
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device)))
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        return self.lm_head(self.ln_f(x)), None


class Literals(nn.Module):
    """Sizes as plain numbers in `forward`: 4 heads of 16, width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 64), nn.Parameter(torch.randn(1, 32, 64))
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.fc1, self.fc2, self.head = nn.Linear(64, 100), nn.Linear(100, 64), nn.Linear(64, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, time = tokens.shape
        x = self.embed(tokens) + self.positions[:, :time]
        qkv = self.qkv(self.norm(x)).view(batch, time, 3, 4, 16)
        q, k, v = (qkv[:, :, i].permute(0, 2, 1, 3) for i in range(3))
        scores = torch.matmul(q, k.transpose(2, 3)) / 4.0
        scores = scores + torch.triu(torch.full((time, time), -1e9, device=x.device), diagonal=1)
        mixed = scores.softmax(-1).matmul(v).permute(0, 2, 1, 3).reshape(batch, time, 64)
        x = x + self.out(mixed)
        hidden = self.fc1(x)
        gate, value = hidden[..., :50], hidden[..., 50:]
        x = x + F.linear(torch.cat([F.silu(gate) * value, gate], dim=-1), self.fc2.weight, self.fc2.bias)
        return self.head(x)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (
            x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        ).type_as(x)


def rotate_by_slices(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions of [batch, heads, time, head_dim] with halves of the head swapped."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * frequency
    one, two = x[..., :half], x[..., half:]
    cos, sin = angle.cos().type_as(x), angle.sin().type_as(x)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], dim=-1)


def rotate_by_complex(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions of [batch, time, heads, head_dim] as Llama's first code had them: complex numbers."""
    frequency = 1.0 / (base ** (torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1]))
    angle = torch.outer(torch.arange(x.shape[1], device=x.device).float(), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None, :]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


class GroupedQueryBlock(nn.Module):
    """Rotary positions, fewer key-value heads than query heads, SwiGLU with gate and value in one matrix."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, complex_rotation: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, 8
        self.complex_rotation = complex_rotation
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * 8, bias=False)
        self.wo = nn.Linear(heads * 8, width, bias=False)
        self.w13, self.w2 = nn.Linear(width, 2 * 34, bias=False), nn.Linear(34, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        sizes = [self.heads * 8, self.kv_heads * 8, self.kv_heads * 8]
        q, k, v = self.wqkv(x).split(sizes, dim=-1)
        q = q.view(batch, time, self.heads, 8)
        k, v = k.view(batch, time, self.kv_heads, 8), v.view(batch, time, self.kv_heads, 8)
        if self.complex_rotation:
            q, k = rotate_by_complex(q).transpose(1, 2), rotate_by_complex(k).transpose(1, 2)
        else:
            q, k = rotate_by_slices(q.transpose(1, 2)), rotate_by_slices(k.transpose(1, 2))
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, time, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        gate, value = self.w13(self.norm2(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * value)


class GroupedQueryGPT(nn.Module):
    def __init__(
        self, *, heads: int = 6, kv_heads: int = 3, blocks: int = 1, complex_rotation: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 20)
        layers = (
            GroupedQueryBlock(20, heads, kv_heads, complex_rotation=complex_rotation) for _ in range(blocks)
        )
        self.blocks = nn.Sequential(*layers)
        self.norm, self.head = nn.RMSNorm(20), nn.Linear(20, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Head(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(32, 32)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = F.softmax(wei.masked_fill(self.tril[:T, :T] == 0, float("-inf")), dim=-1)
        return self.dropout(wei) @ self.value(x)


class LectureGPT(nn.Module):
    """The `gpt.py` of Karpathy's lecture: a list of single heads, concatenated."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.token_table, self.position_table = nn.Embedding(50, width), nn.Embedding(32, width)
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.proj = nn.Linear(width, width)
        self.ln1, self.ln2, self.ln_f = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffwd = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )
        self.lm_head = nn.Linear(width, 50)

    def forward(self, idx: Tensor) -> Tensor:
        _, T = idx.shape
        x = self.token_table(idx) + self.position_table(torch.arange(T, device=idx.device))
        x = x + self.proj(torch.cat([head(self.ln1(x)) for head in self.heads], dim=-1))
        x = x + self.ffwd(self.ln2(x))
        return self.lm_head(self.ln_f(x))


class Sinusoidal(nn.Module):
    """The first transformer's positions: a constant table, in the state dict or not, on the stream."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        position = torch.arange(32).unsqueeze(1)
        divide = torch.exp(torch.arange(0, 24, 2) * (-math.log(10000.0) / 24))
        table = torch.zeros(1, 32, 24)
        table[0, :, 0::2], table[0, :, 1::2] = torch.sin(position * divide), torch.cos(position * divide)
        self.register_buffer("pe", table, persistent=persistent)
        self.embed, self.fc1, self.fc2 = nn.Embedding(50, 24), nn.Linear(24, 60), nn.Linear(60, 24)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 50)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, 4, 6).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * math.sqrt(24) + self.pe[:, : tokens.size(1)]
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        mixed = torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()
        x = F.layer_norm(x + self.out(mixed.view(tokens.size(0), -1, 4 * 6)), (24,))
        return self.head(x + self.fc2(F.relu(self.fc1(x))))


def _sequence(name: str, model: object, reach: float, **more: object) -> Entry:
    return Entry(name, model, tokens(50), reach, sequence=True, **more)  # type: ignore[arg-type]


HANDWRITTEN = (
    _sequence(
        "nanogpt",
        NanoGPT,
        0.97,
        whole=(50, 32, 8),
        heads=((3, 8),),
        invariant=("h.0.attn.c_attn.bias:0:24", "h.1.attn.c_attn.bias:0:24"),  # of the keys
    ),
    _sequence(
        "nanogpt_slow", lambda: NanoGPT(fused=False, bias=False), 0.97, whole=(50, 32, 8), heads=((3, 8),)
    ),
    # every size is the same number: only structure tells width from time, heads, head size and vocabulary
    Entry("nanogpt_square", lambda: NanoGPT(16, 4, 16), tokens(16), 0.97, sequence=True, heads=((4, 4),)),
    _sequence("literals", Literals, 0.97, whole=(32, 16), heads=((4, 16),)),
    _sequence(
        "gqa_slices", lambda: GroupedQueryGPT(blocks=2), 0.99, whole=(50, 8, 6), heads=((3, 8), (3, 16))
    ),
    _sequence(
        "gqa_complex",
        lambda: GroupedQueryGPT(heads=4, kv_heads=2, complex_rotation=True),
        0.99,
        whole=(50, 8, 4),
        heads=((2, 8), (2, 16)),
    ),
    _sequence("mqa", lambda: GroupedQueryGPT(heads=3, kv_heads=1), 0.99, whole=(50, 8)),
    _sequence("lecture_gpt", LectureGPT, 0.97, whole=(50, 32)),
    _sequence("sinusoidal", lambda: Sinusoidal(persistent=True), 0.97, whole=(50, 32, 6), heads=((4, 6),)),
    _sequence(
        "sinusoidal_hidden", lambda: Sinusoidal(persistent=False), 0.3, whole=(50, 32, 6), heads=((4, 6),)
    ),
)
