"""All that a GPU is needed for, in one command: does a run on it give the CPU's numbers, how fast, in how much memory?

- `numbers`: two rounds of each method on the GPU and on the CPU, in float64, where nothing but a mistake can tell them
  apart, and in float32. `apart` is the largest difference of any entry of the global state, relative to the largest.
- `together`: participants that are trained at once, against one after the other, both on the GPU (`vectorised.py`).
- `precision`: bfloat16 against float32: the loss after some rounds, and seconds of a round.
- `gpt2`: GPT-2 of 124 million parameters in slices of a quarter, on random tokens: seconds of a round, and the
  measured peak of the GPU's memory beside what `plan` foretells.
- `sharded`: the engine without a server, one rank for each GPU and once more as many on the CPU: equal states?

    python benchmarks/gpu.py > benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --quick      # tries the command itself, where there is no GPU
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from vectorised import compare, in_type

import msfusion
from msfusion.batch import Batch
from msfusion.costs import costs_of
from msfusion.data.federated import FederatedData
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec
from msfusion.experiment.environment import environment
from msfusion.federated.training import TrainingSettings
from msfusion.files import read_tensors
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec

METHODS: dict[str, msfusion.MSfusion | msfusion.Small | msfusion.FedAvg] = {
    "fresh": msfusion.MSfusion(ratio=0.25, start="fresh"),
    "copies": msfusion.MSfusion(ratio=0.25, start="copies"),
    "blocks": msfusion.MSfusion(ratio=0.25, start="blocks", blocks=2),
    "small": msfusion.Small(ratio=0.25),
    "fedavg": msfusion.FedAvg(),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet": ("digits", {}),
    "resnet": ("digits", {}),
    "decoder_lm": ("python-docs", {"features": 64, "heads": 8, "layers": 2}),
}
TRAINING = TrainingSettings(optimizer="sgd", learning_rate=0.05, momentum=0.9, batch_size=8)
ALMOST = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far states may be apart, relative to their largest entry: rounding, which grows further in float32."""


def data_for(source: str, examples: int) -> FederatedData:
    """Three participants with so many examples each."""
    return load_data(
        DataSpec(
            source,
            participants=3,
            partition="iid",
            max_train=3 * examples,
            max_test=32,
            vocabulary_size=512,
            length=32,
        )
    )


def state_after(
    model: nn.Module, data: FederatedData, method: Any, device: str, training: TrainingSettings = TRAINING
) -> dict[str, torch.Tensor]:
    """The global state after two rounds."""
    federation = msfusion.Federation(
        model, data, method, training=training, engine=msfusion.InProcess(device)
    )
    federation.fit(2)
    return federation.state


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two states, relative to the largest entry."""
    pairs = [(one[name].double(), other[name].double()) for name in one]
    largest = max(float(left.abs().max()) for left, _ in pairs if left.numel())
    return max(float((left - right).abs().max()) for left, right in pairs if left.numel()) / largest


def numbers(device: str, quick: bool) -> list[dict[str, Any]]:
    """Each method and model in two precisions, on the device and on the CPU."""
    rows = []
    for name in ["convnet"] if quick else MODELS:
        source, options = MODELS[name]
        found = data_for(source, 16)
        for dtype, almost in ALMOST.items():
            model = build_model(ModelSpec(name, options=options), found).to(dtype)
            data = in_type(found.for_model(model), dtype)
            for method, settings in METHODS.items():
                states = [state_after(model, data, settings, each) for each in ("cpu", device)]
                difference = apart(*states)
                rows.append(
                    {
                        "model": name,
                        "method": method,
                        "dtype": str(dtype).removeprefix("torch."),
                        "apart": difference,
                        "as_expected": difference < almost,
                    }
                )
    return rows


def together(device: str, quick: bool) -> list[dict[str, Any]]:
    """Participants trained at once against one after the other, on the device."""
    models, participants = (["convnet"], [4]) if quick else ([*MODELS], [10, 100])
    return [compare(model, count, device, 1, 2 if quick else 5) for model in models for count in participants]


def precision(device: str, quick: bool) -> list[dict[str, Any]]:
    """The convnet in float32 and in bfloat16."""
    data = data_for("digits", 32 if quick else 400)
    model = build_model(ModelSpec("convnet"), data)
    rows = []
    for name in ("float32", "bfloat16"):
        training = replace(TRAINING, precision=name)
        federation = msfusion.Federation(
            model,
            data.for_model(model),
            msfusion.MSfusion(ratio=0.5, start="fresh"),
            training=training,
            engine=msfusion.InProcess(device),
        )
        rounds = federation.fit(2 if quick else 10)
        evaluation = rounds[-1].evaluation
        assert evaluation is not None
        rows.append(
            {
                "precision": name,
                "loss": evaluation.loss,
                "accuracy": evaluation.accuracy,
                "seconds_of_a_round": statistics.median(each.seconds for each in rounds[1:]),
            }
        )
    return rows


def gpt2(device: str, quick: bool) -> dict[str, Any]:
    """GPT-2 in slices of a quarter: what a participant needs, foretold and measured."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512} if quick else {}
    torch.manual_seed(0)
    config = GPT2Config(
        use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, n_positions=128, **sizes
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(config.vocab_size, (3, 8, 65))
    data = [Batch({"input_ids": each[:, :-1].contiguous()}, each[:, 1:].contiguous()) for each in tokens]
    training = TrainingSettings(optimizer="adamw", learning_rate=1e-4, batch_size=4)
    federation = msfusion.Federation(
        model,
        data,
        msfusion.MSfusion(ratio=0.25, start="fresh"),
        training=training,
        engine=msfusion.InProcess(device),
    )
    rounds = federation.rounds(3)
    next(rounds)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    losses = [each.training_loss for each in rounds]
    slice_ = federation.method.trained_at(0.25)
    foretold = costs_of(slice_, data[0].take(slice(0, 4)), optimizer_states_per_parameter=2)
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "parameters_of_a_slice": foretold.parameters,
        "foretold_peak_bytes": foretold.peak_memory,
        "measured_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "seconds_of_a_round": (time.perf_counter() - begin) / 2,
        "training_losses": losses,
        "finite": all(loss is not None and math.isfinite(loss) for loss in losses),
    }


SHARDED = """
rounds = 2
[data]
source = "digits"
max_train = 120
[model]
name = "convnet"
[method]
start = "fresh"
[participants]
count = 3
ratio = 0.5
"""


def sharded(device: str, quick: bool) -> dict[str, Any]:
    """The engine without a server on this device, against one process on the CPU."""
    ranks = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "job.toml"
        config.write_text(SHARDED)
        runs = {
            "one": [sys.executable, "-m", "msfusion", "train", str(config)],
            "ranks": [
                *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m"),
                *("msfusion", "train", str(config), "--set", "run.engine=sharded"),
                *("--set", f"run.device={device}"),
            ],
        }
        for name, command in runs.items():
            out = str(Path(folder) / name)
            finished = subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=600)
            if finished.returncode:
                told = [line for line in finished.stderr.splitlines() if line.startswith("msfusion:")]
                return {"ranks": ranks, "failed": (told or [f"exit code {finished.returncode}"])[0]}
        states = [read_tensors(Path(folder) / name / "model.safetensors")[0] for name in runs]
    difference = apart(*states)
    return {"ranks": ranks, "apart": difference, "as_expected": difference < ALMOST[torch.float32]}


PARTS: dict[str, Callable[[str, bool], Any]] = {
    "numbers": numbers,
    "together": together,
    "precision": precision,
    "gpt2": gpt2,
    "sharded": sharded,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny models: is the command sound?")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: PyTorch finds no GPU on this machine (--device cpu --quick tries the command itself)"
        )
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": environment(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "quick": arguments.quick,
    }
    for name in arguments.parts:
        try:
            report[name] = PARTS[name](arguments.device, arguments.quick)
        except Exception as error:  # the other parts are worth knowing, whatever becomes of this one
            report[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"gpu.py: {name} is done", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
