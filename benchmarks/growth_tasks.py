"""What growth.py trains: models of two sizes, and their data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import msfusion
from msfusion.batch import IGNORED
from msfusion.data import DataSpec, FederatedData, load_data
from msfusion.models.transformer import DecoderLM

DEFAULTS: dict[str, dict[str, Any]] = {
    "wikitext2": {"learning_rate": 2e-3, "batch_size": 16, "steps": 2000, "small_steps": 2000, "tests": 500},
    "agnews": {"learning_rate": 5e-4, "batch_size": 16, "steps": 4000, "small_steps": 4000, "tests": 1000},
}
"""The settings of each task, where the command says nothing else."""


@dataclass(frozen=True)
class Size:
    """A transformer's width, layers and heads, written 128x2x4."""

    features: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and for how long."""

    train: msfusion.Batch
    test: msfusion.Batch
    build: Callable[[Size], nn.Module]
    small: Size
    large: Size
    settings: argparse.Namespace

    @property
    def inputs(self) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
        """What the models are traced with."""
        return self.train.take(slice(2)).inputs


def job(args: argparse.Namespace) -> Job:
    """The task's data and models."""
    return (next_words if args.task == "wikitext2" else masked_words)(args)


def next_words(args: argparse.Namespace) -> Job:
    """A decoder language model (norms before the blocks) on WikiText-2."""
    length = 32 if args.quick else 64
    data = loaded(args, "wikitext-2", length, task="language_modelling", partition="contiguous")

    def build(size: Size) -> nn.Module:
        options: dict[str, Any] = {"block_length": length, "features": size.features, "heads": size.heads}
        return DecoderLM(data.vocabulary_size or 0, layers=size.layers, **options)

    return Job(data.participants[0], data.test, build, args.small, args.large, args)


def masked_words(args: argparse.Namespace) -> Job:
    """BERT (norms after the blocks) as a masked language model on AG News: 40 % of the words are to be found."""
    from transformers import BertConfig, BertForMaskedLM

    data = loaded(args, "ag_news", 32, task="classification")
    mask = data.tokens.index("<mask>")

    def masked(texts: msfusion.Batch, seed: int) -> msfusion.Batch:
        assert isinstance(texts.inputs, tuple)
        tokens = texts.inputs[0]
        hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        hidden &= tokens > mask  # words; neither padding nor what stands for all others
        inputs = {
            "input_ids": tokens.masked_fill(hidden, mask),
            "attention_mask": (tokens != data.tokens.index("<pad>")).long(),
        }
        return msfusion.Batch(inputs, tokens.masked_fill(~hidden, IGNORED))

    def build(size: Size) -> nn.Module:
        return BertForMaskedLM(
            BertConfig(
                vocab_size=len(data.tokens),
                hidden_size=size.features,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.features,
                max_position_embeddings=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    return Job(masked(data.participants[0], 0), masked(data.test, 1), build, args.small, args.large, args)


def loaded(args: argparse.Namespace, folder: str, length: int, **how: Any) -> FederatedData:
    """All the data of a folder as one participant's, in numbers of 4,096 words."""
    spec = DataSpec(
        str(Path(args.data) / folder),
        tokenizer="words",
        vocabulary_size=4096,
        length=length,
        max_train=args.examples,
        max_test=args.tests,
        participants=1,
        **{"partition": "iid", **how},
    )
    return load_data(spec)
