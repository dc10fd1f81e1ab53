"""How long it takes to find and prove the width map of a large model, and in how much memory beyond its own.

Each model is traced in a process of its own, on one thread. Memory is the highest resident size while
tracing, less the resident size after a forward pass of the model, as a share of the parameters' bytes: 1.0
would be a second copy. The processor's seconds are given beside those of the clock, for a busy machine.

    python benchmarks/width_map.py --json

`--before SRC` measures the sources of another commit too, in turns with these, and prints the ratios:

    git worktree add /tmp/before f263c1a
    python benchmarks/width_map.py gpt2 bert_large --before /tmp/before/src --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from msfusion.experiment.environment import environment
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

TARGET_SECONDS = 10.0
TARGET_COPIES = 1.0
TARGET_RATIO = 1.5
REPEATS = 2
COMPARED = ("trace_seconds", "trace_processor_seconds", "peak_memory_mb", "extra_memory_mb")


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 (124 M parameters), tied head, two texts of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    return model, {"input_ids": torch.randint(50257, (2, 32))}


def bert_large() -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-large (335 M parameters) with a classifier, two texts of 64 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=4))
    texts = {
        "input_ids": torch.randint(30000, (2, 64)),
        "attention_mask": torch.ones(2, 64, dtype=torch.long),
    }
    return model, texts


def vit_base() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-B/16 (86 M parameters), two images of 224 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_labels=1000))
    return model, {"pixel_values": torch.randn(2, 3, 224, 224)}


MODELS = {"gpt2": gpt2, "bert_large": bert_large, "vit_base": vit_base}


def resident() -> int:
    """The bytes of this process that are in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """The highest resident size while the block runs, looked up every five milliseconds."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.done = resident(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Look until the block is left."""
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(name: str) -> dict[str, Any]:
    """Trace one model, prove its map again, and cut a half-wide sub-model out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the libraries, while the models are built
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    with torch.no_grad():
        model(**inputs)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resident()
    with PeakMemory() as memory:
        begin, begin_processor = time.perf_counter(), time.process_time()
        width_map = trace(model, inputs)
        seconds, processor = time.perf_counter() - begin, time.process_time() - begin_processor
    begin = time.perf_counter()
    width_map.prove()
    proof = time.perf_counter() - begin
    window = {group.name: torch.arange(-(-group.units // 2)) for group in width_map.groups}
    begin = time.perf_counter()
    held = sum(p.numel() for p in narrow(model, width_map, window).parameters())
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(width_map.groups),
        "reach": round(width_map.reach(), 4),
        "trace_seconds": round(seconds, 2),
        "trace_processor_seconds": round(processor, 2),
        "of_which_proof": round(proof, 2),
        "narrow_seconds": round(time.perf_counter() - begin, 2),
        "half_wide_parameters": held,
        "peak_memory_mb": round(memory.peak / 2**20),
        "extra_memory_mb": round((memory.peak - before) / 2**20),
        "extra_memory_in_copies": round((memory.peak - before) / size, 2),
        "within_targets": seconds <= TARGET_SECONDS and memory.peak - before < TARGET_COPIES * size,
    }


def compare(name: str, before: Path) -> dict[str, Any]:
    """A model traced by the sources in `before` and by these, in turns, each in a process of its own; the ratios."""
    sources = {"before": before, "after": Path(__file__).parents[1] / "src"}
    measured: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for _ in range(REPEATS):
        for which, source in sources.items():
            told = subprocess.run(
                [sys.executable, __file__, name, "--json"],
                env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True, check=True,
            )  # fmt: skip
            measured[which] += json.loads(told.stdout)["results"]
    best = {
        which: {key: min(result[key] for result in results) for key in COMPARED}
        for which, results in measured.items()
    }
    ratios = {key: round(best["after"][key] / best["before"][key], 2) for key in COMPARED}
    return {
        "model": name,
        **best,
        "ratio": ratios,
        "within_target": max(ratios["trace_processor_seconds"], ratios["peak_memory_mb"]) <= TARGET_RATIO,
    }


def main() -> None:
    """Measure all models, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--before", type=Path, metavar="SRC", help="the src folder of a commit to compare with"
    )
    options = parser.parse_args()
    if options.before is not None:
        compared = [compare(name, options.before) for name in options.models]
        print(json.dumps({"machine": environment(), "results": compared}, indent=2))
        return
    spawn = multiprocessing.get_context("spawn")
    results = []
    for name in options.models:
        with spawn.Pool(1) as pool:
            results.append(pool.apply(measure, (name,)))
    if options.json:
        print(json.dumps({"machine": environment(), "results": results}, indent=2))
        return
    for result in results:
        print(
            f"{result['model']}: {result['parameters'] / 1e6:.0f} M parameters, {result['groups']} groups, "
            f"traced and proved in {result['trace_seconds']} s (target {TARGET_SECONDS:.0f} s) with "
            f"{result['extra_memory_in_copies']} copies of the model in extra memory (target below 1)"
        )


if __name__ == "__main__":
    main()
