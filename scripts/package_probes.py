"""What each extra is for, as commands and programs that end well with it, and that are refused without."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

Command = tuple[str, ...]

CLI = "typer, rich, pydantic, tomli_w"
"""What the command line needs."""


@dataclass(frozen=True)
class Probe:
    """Commands that are run one after the other, while those in the background go on."""

    commands: tuple[Command, ...]
    background: tuple[Command, ...] = ()


def job_folder(folder: Path) -> Path:
    """A folder with a small job, a table and images, for the commands to work on."""
    folder.mkdir(parents=True)
    (folder / "job.toml").write_text(JOB)
    rows = [f"{number},{number * 7 % 11},{number % 2}" for number in range(40)]
    (folder / "table.csv").write_text("\n".join(["a,b,label", *rows]))
    for number in range(8):
        path = folder / "images" / ("dark" if number % 2 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(8, 20 if number % 2 else 220))
    return folder


def grey_png(size: int, value: int) -> bytes:
    """A grey square as PNG, without a library for images."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    rows = (b"\0" + bytes([value]) * size) * size
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


JOB = """
rounds = 1
data = { source = "digits", max_train = 40, max_test = 20 }
model = { name = "convnet", options = { widths = [4, 8] } }
participants = { count = 2, ratio = 0.5 }
training = { optimizer = "adamw", learning_rate = 0.01 }
run = { workers = 1 }
"""

PROGRAM = """
import sys
import msfusion
from msfusion.data import load_data
from msfusion.models import ModelSpec, build_model

def federation(**more):
    data = load_data(msfusion.DataSpec("digits", participants=3, max_train=60, max_test=20))
    model = build_model(ModelSpec("convnet", {"widths": [4, 8]}), data)
    return msfusion.Federation(model, data, method=msfusion.Small(ratio=0.5), **more)

def probe():
    %s

try:
    probe()
except msfusion.MsfusionError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def _program(*lines: str) -> Probe:
    return Probe((("python", "-c", PROGRAM % "\n    ".join(lines)),))


GPT2 = "{ n_embd = 16, n_layer = 1, n_head = 2 }"

PROGRAMS = {
    "data": Probe(
        _program(
            """load_data(msfusion.DataSpec("table.csv", participants=2, input_column=["a", "b"]))"""
        ).commands
        + _program("""load_data(msfusion.DataSpec("images", participants=2))""").commands
    ),
    "transformers": _program(
        """options = {"n_embd": 16, "n_layer": 1, "n_head": 2}""",
        """data = load_data(msfusion.DataSpec("python-docs", participants=2, max_train=8, max_test=4, length=16))""",
        """model = build_model(ModelSpec("transformers:gpt2", options), data)""",
        """msfusion.Federation(model, data, method=msfusion.Small(ratio=0.5)).fit(1)""",
    ),
    "tensorboard": _program("""federation(callbacks=[msfusion.TensorBoard("logs")]).fit(1)"""),
    "metrics": _program(
        """from msfusion.scoring import metrics_named""",
        """print(federation(metrics=metrics_named(["f1"], 10, True)).fit(1)[-1].figures()["f1"])""",
    ),
    "codecs": _program(
        """import torch""",
        """codec = msfusion.codecs.by_name("top_k", entropy="zstd")""",
        """print(codec.decode(codec.encode(torch.randn(8, 64))).shape)""",
    ),
    "onnx": _program(
        """from pathlib import Path""",
        """from msfusion.experiment.program import write_program""",
        """data = load_data(msfusion.DataSpec("digits", participants=2, max_train=20, max_test=10))""",
        """model = build_model(ModelSpec("convnet", {"widths": [4, 8]}), data)""",
        """write_program(model, data, Path(), "onnx")""",
    ),
    "stream": _program("""print(federation(secure=True).fit(1)[-1].figures())"""),
}
"""What an extra is for in a program, without the command line."""


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


ADDRESS = _free_address()
_JOIN = ("msfusion", "join", "job.toml", "--address", ADDRESS, "--plain-text", "--participant")

COMMANDS = {
    "cli": Probe(
        (
            ("msfusion", "doctor"),
            ("msfusion", "train", "job.toml", "--out", "run"),
            ("msfusion", "export", "run", "--out", "model"),
            ("msfusion", "predict", "model", "digits"),
            ("msfusion", "report", "run", "--out", "run.html"),
        )
    ),
    "data": Probe(
        (
            ("msfusion", "train", "job.toml", "--out", "table", "--set", "data.source=table.csv",
             "--set", "model={ name = 'mlp', options = { hidden = [8] } }"),
            ("msfusion", "train", "job.toml", "--out", "pixels", "--set", "data.source=images"),
        )
    ),
    "transformers": Probe(
        (
            ("msfusion", "train", "job.toml", "--out", "text", "--set", "data.source=python-docs", "--set",
             "data.length=16", "--set", f"model={{ name = 'transformers:gpt2', options = {GPT2} }}"),
        )
    ),
    "plot": Probe((("msfusion", "plan", "job.toml", "--out", "plan"),)),
    "metrics": Probe(
        (("msfusion", "train", "job.toml", "--out", "f1", "--set", "evaluation.metrics=['f1']"),)
    ),
    "codecs": Probe(
        (
            ("msfusion", "train", "job.toml", "--out", "split", "--set", "method.name=split", "--set",
             "split={ at = 'layers.3', activations = { codec = 'top_k', entropy = 'zstd' } }"),
        )
    ),
    "stream": Probe(
        ((*_JOIN, "0"), ("msfusion", "certificates", "--out", "keys", "--host", "localhost", "--participants", "2")),
        background=(
            ("msfusion", "serve", "job.toml", "--address", ADDRESS, "--plain-text", "--out", "served"),
            (*_JOIN, "1"),
        ),
    ),
    "flower": Probe((("msfusion", "deploy", "flower", "job.toml", "--out", "app"),)),
}  # fmt: skip
"""What an extra is for on the command line; those of `cli` need no other."""
