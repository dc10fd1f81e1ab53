"""Small transformers for text: a classifier and a decoder language model. Both are pre-norm, without biases
in attention where they would do nothing, and written to be read.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from msfusion.errors import ConfigError
from msfusion.models.convolutional import require_positive


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762, section 3.2). A head is one unit of the
    width map.
    """

    def __init__(self, features: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.head_features = features // heads
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features, bias=False)  # softmax would cancel a bias of the keys
        self.value = nn.Linear(features, features)
        self.output = nn.Linear(features, features)

    def _split(
        self, projected: Float[Tensor, "examples time features"]
    ) -> Float[Tensor, "examples heads time head"]:
        examples, time, _ = projected.shape
        return projected.view(examples, time, self.heads, self.head_features).transpose(1, 2)

    def forward(
        self,
        stream: Float[Tensor, "examples time features"],
        attended: Bool[Tensor, "examples 1 1 time"] | None = None,
    ) -> Float[Tensor, "examples time features"]:
        """What each position gathers from those that it may look at."""
        query, key, value = (
            self._split(self.query(stream)),
            self._split(self.key(stream)),
            self._split(self.value(stream)),
        )
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attended,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to the stream."""

    def __init__(self, features: int, heads: int, hidden: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(features)
        self.attention = Attention(features, heads, causal, dropout)
        self.hidden_norm = nn.LayerNorm(features)
        self.expand = nn.Linear(features, hidden)
        self.contract = nn.Linear(hidden, features)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        stream: Float[Tensor, "examples time features"],
        attended: Bool[Tensor, "examples 1 1 time"] | None = None,
    ) -> Float[Tensor, "examples time features"]:
        """The stream, with what this block adds."""
        stream = stream + self.dropout(self.attention(self.attention_norm(stream), attended))
        hidden = functional.gelu(self.expand(self.hidden_norm(stream)))
        result: Tensor = stream + self.dropout(self.contract(hidden))
        return result


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and a last normalisation: what both models share."""

    def __init__(
        self,
        vocabulary_size: int,
        block_length: int,
        features: int,
        heads: int,
        layers: int,
        hidden: int | None,
        causal: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        hidden = 4 * features if hidden is None else hidden
        require_positive(vocabulary_size=vocabulary_size, block_length=block_length, layers=layers)
        require_positive(features=features, heads=heads, hidden=hidden)
        if features % heads:
            raise ConfigError(f"model.options.heads = {heads} must divide features = {features}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.options.dropout = {dropout} must be at least 0 and below 1.")
        self.tokens = nn.Embedding(vocabulary_size, features)
        self.positions = nn.Embedding(block_length, features)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            [TransformerBlock(features, heads, hidden, causal, dropout) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(features)
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        """GPT-2's: normal weights of deviation 0.02, smaller by depth where a block adds to the stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("attention.output", "contract"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Int[Tensor, "examples time"],
        attended: Bool[Tensor, "examples 1 1 time"] | None = None,
    ) -> Float[Tensor, "examples time features"]:
        """Encode at most `block_length` tokens; `attended` says which of them may be looked at."""
        stream = self.dropout(self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]])
        for block in self.blocks:
            stream = block(stream, attended)
        normalised: Tensor = self.norm(stream)
        return normalised


class TextClassifier(nn.Module):
    """A transformer encoder over tokens; the mean over those that are not padding; a linear head."""

    def __init__(
        self,
        vocabulary_size: int,
        classes: int,
        *,
        block_length: int = 64,
        features: int = 128,
        heads: int = 8,
        layers: int = 2,
        hidden: int | None = None,
        dropout: float = 0.0,
        padding: int = 0,
    ) -> None:
        """block_length: the longest text in tokens. padding: the id that fills texts up. hidden: 4 *
        features.

        Raises ConfigError for sizes that do not fit.
        """
        super().__init__()
        require_positive(classes=classes)
        self.padding = padding
        self.encoder = Transformer(
            vocabulary_size, block_length, features, heads, layers, hidden, causal=False, dropout=dropout
        )
        self.head = nn.Linear(features, classes)

    def forward(
        self,
        input_ids: Int[Tensor, "examples time"],
        attention_mask: Int[Tensor, "examples time"] | None = None,
    ) -> Float[Tensor, "examples classes"]:
        """attention_mask: 1 where there is text, 0 where padding; by default where ids are not `padding`."""
        present = input_ids != self.padding if attention_mask is None else attention_mask != 0
        # everyone may look at the first position, lest a text of nothing but padding leave nothing to look at
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        encoded = self.encoder(input_ids, (present | first)[:, None, None, :])
        weights = present.unsqueeze(-1).to(encoded.dtype)
        mean = (encoded * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        logits: Tensor = self.head(mean)
        return logits


class DecoderLM(nn.Module):
    """A decoder that predicts each next token (Radford et al. 2019; the form of nanoGPT)."""

    def __init__(
        self,
        vocabulary_size: int,
        *,
        block_length: int = 64,
        features: int = 128,
        heads: int = 8,
        layers: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        """block_length: the longest input in tokens. hidden: by default 4 * features. tied: one matrix embeds
        tokens and predicts them. Raises ConfigError for sizes that do not fit.
        """
        super().__init__()
        self.decoder = Transformer(
            vocabulary_size, block_length, features, heads, layers, hidden, causal=True, dropout=dropout
        )
        self.head = nn.Linear(features, vocabulary_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        if tied:
            self.head.weight = self.decoder.tokens.weight

    def forward(self, input_ids: Int[Tensor, "examples time"]) -> Float[Tensor, "examples time vocabulary"]:
        """Tokens to the logits of each next one; at most `block_length` tokens."""
        logits: Tensor = self.head(self.decoder(input_ids))
        return logits
