"""Sequence models made of PyTorch's own layers: recurrent, convolutional, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, Inputs, sequences, tokens


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder` with a padding mask made from the tokens, learned positions, mean over time."""

    def __init__(self, width: int = 24, heads: int = 3, *, norm_first: bool = False) -> None:
        super().__init__()
        self.embed, self.positions = (
            nn.Embedding(50, width, padding_idx=0),
            nn.Parameter(torch.randn(1, 32, width)),
        )
        layer = nn.TransformerEncoderLayer(
            width, heads, 40, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[:, : tokens.size(1)]
        padding = tokens == 0
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.mean(dim=1))


class Translator(nn.Module):
    """`nn.Transformer`, time first: encoder, decoder, a causal mask."""

    def __init__(self, width: int = 20, heads: int = 2) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, width), nn.Embedding(60, width)
        self.transformer = nn.Transformer(width, heads, 1, 1, 36, dropout=0.1, activation="gelu")
        self.head = nn.Linear(width, 60)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), device=target.device)
        read, write = self.source(source).transpose(0, 1), self.target(target).transpose(0, 1)
        return self.head(self.transformer(read, write, tgt_mask=mask).transpose(0, 1))


class Decoder(nn.Module):
    """`nn.TransformerDecoder` over a given memory."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(7, width), nn.Linear(5, width)
        layer = nn.TransformerDecoderLayer(width, 4, 36, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(width))
        self.head = nn.Linear(width, 9)

    def forward(self, memory: Tensor, target: Tensor) -> Tensor:
        return self.head(self.decoder(self.write(target), self.read(memory)))


class BareAttention(nn.Module):
    """`nn.MultiheadAttention` by itself, its weights returned too; keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.key, self.value = nn.Linear(7, 24), nn.Linear(7, 14), nn.Linear(7, 18)
        self.attention = nn.MultiheadAttention(24, 4, kdim=14, vdim=18, batch_first=True)
        self.own = nn.MultiheadAttention(24, 2, batch_first=True, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(self.read(x), self.key(x), self.value(x))
        again, _ = self.own(mixed, mixed, mixed, need_weights=False)
        return self.head(again + mixed), weights


class Recurrent(nn.Module):
    """Embedding, a recurrent layer of the given class, the last state or all states to the head."""

    def __init__(
        self, layer: type[nn.RNNBase], *, layers: int = 1, both: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 14)
        self.recurrent = layer(14, 18, layers, batch_first=True, bidirectional=both, dropout=dropout)
        self.hidden = nn.Linear(36 if both else 18, 22)
        self.head = nn.Linear(22, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embed(tokens))
        return self.head(F.relu(self.hidden(states[:, -1])))


class LanguageLSTM(nn.Module):
    """A word-level language model as in PyTorch's examples: time first, states handed out, decoder tied."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 16, 2, dropout=0.2)
        self.decoder = nn.Linear(16, 50)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out, (hidden, _cell) = self.rnn(self.drop(self.encoder(tokens)).transpose(0, 1))
        return F.log_softmax(self.decoder(self.drop(out)), dim=-1).transpose(0, 1), hidden.sum(-1).transpose(
            0, 1
        )


class TextCNN(nn.Module):
    """Kim's text classifier: kernels of several widths, maximum over time, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.convs = nn.ModuleList(nn.Conv1d(12, width, size) for width, size in ((8, 3), (10, 4), (14, 5)))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        pooled = [F.relu(conv(x)).max(dim=2)[0] for conv in self.convs]
        return self.head(self.drop(torch.cat(pooled, 1)))


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions with residual and skip streams."""

    def __init__(self, width: int = 12, skip: int = 16) -> None:
        super().__init__()
        self.start = nn.Conv1d(5, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 20, 1), nn.ReLU(), nn.Conv1d(20, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x.transpose(1, 2))
        skips: Tensor | int = 0
        for i, (gate, residual, skip) in enumerate(zip(self.gates, self.residuals, self.skips, strict=True)):
            signal, control = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            out = torch.tanh(signal) * torch.sigmoid(control)
            skips = skips + skip(out)
            x = x + residual(out)
        return self.end(skips).transpose(1, 2)


class AttentionSeq2Seq(nn.Module):
    """Encoder and decoder without recurrence: additive (Bahdanau) attention between two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, 16), nn.Embedding(40, 18)
        self.encode = nn.Sequential(nn.Linear(16, 22), nn.GELU())
        self.query, self.key = nn.Linear(18, 20, bias=False), nn.Linear(22, 20)
        self.score = nn.Parameter(torch.randn(20))
        self.head = nn.Linear(40, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encode(self.source(source)), self.target(target)
        mixed = torch.tanh(self.query(state).unsqueeze(2) + self.key(memory).unsqueeze(1))
        weights = torch.softmax((mixed * self.score).sum(-1), dim=-1)
        return self.head(torch.cat([state, torch.bmm(weights, memory)], dim=-1))


class TokenBag(nn.Module):
    """FastText: the mean of the embeddings, through `nn.EmbeddingBag`, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.other = nn.EmbeddingBag(50, 14, mode="mean"), nn.Embedding(50, 10)
        self.pair, self.head = nn.Bilinear(14, 10, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.pair(self.bag(tokens), self.other(tokens).sum(1))))


def masked_attention_inputs(batch: int, time: int) -> Inputs:
    """Vectors of width 7 for the memory and of width 5 for the target, which is one step longer."""
    (memory,) = sequences(7)(batch, time)
    (target,) = sequences(5)(batch, time + 1)
    return memory, target


def _recurrent(layer: type[nn.RNNBase], **settings: float) -> nn.Module:
    return Recurrent(layer, **settings)  # type: ignore[arg-type]


SEQUENCE = (
    Entry("encoder", EncoderClassifier, tokens(50), 0.99, sequence=True, whole=(5, 8, 50), heads=((3, 8),)),
    Entry(
        "encoder_norm_first",
        lambda: EncoderClassifier(norm_first=True),
        tokens(50),
        0.99,
        sequence=True,
        whole=(5, 8, 50),
        heads=((3, 8),),
    ),
    Entry("translator", Translator, tokens(50, 2), 0.99, sequence=True, whole=(50, 60), heads=((2, 10),)),
    Entry("decoder", Decoder, masked_attention_inputs, 0.99, sequence=True, whole=(5, 7, 9), heads=((4, 6),)),
    Entry(
        "bare_attention",
        BareAttention,
        sequences(7),
        0.97,
        sequence=True,
        whole=(5, 7),
        heads=((4, 6), (2, 12)),
        invariant=("key.bias:0:0", "attention.in_proj_bias:0:24"),  # softmax does not see what all keys share
    ),
    Entry("lstm", lambda: Recurrent(nn.LSTM), tokens(50), 0.99, sequence=True, whole=(6, 50), ablates=True),
    Entry(
        "lstm_both_ways",
        lambda: Recurrent(nn.LSTM, layers=2, both=True, dropout=0.1),
        tokens(50),
        0.99,
        sequence=True,
        whole=(6, 50),
        ablates=True,
        # the head reads the last step, the first of the reverse direction: from a state of zeros
        invariant=("recurrent.weight_hh_l1_reverse:0:0", "recurrent.weight_hh_l1_reverse:1:0"),
    ),
    Entry("gru", lambda: Recurrent(nn.GRU), tokens(50), 0.99, sequence=True, whole=(6, 50), ablates=True),
    Entry(
        "rnn",
        lambda: Recurrent(nn.RNN, layers=2),
        tokens(50),
        0.99,
        sequence=True,
        whole=(6, 50),
        ablates=True,
    ),
    Entry("language_lstm", LanguageLSTM, tokens(50), 0.99, sequence=True, whole=(50,)),
    Entry("text_cnn", TextCNN, tokens(50), 0.99, sequence=True, whole=(4, 50), ablates=True),
    Entry("wavenet", WaveNet, sequences(5), 0.95, sequence=True, whole=(4, 5), ablates=True),
    Entry("attention_seq2seq", AttentionSeq2Seq, tokens(40, 2), 0.99, sequence=True, whole=(40, 50)),
    Entry("token_bag", TokenBag, tokens(50), 0.99, sequence=True, whole=(4, 50)),
)
