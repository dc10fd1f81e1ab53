"""A trained model as a program that needs no msfusion: of `torch.export` (`model.pt2`), or of ONNX (`model.onnx`).

Either takes the model's inputs, any number of examples at once, and gives its logits (or numbers). What has been
written is read again and tried on test examples before it is kept.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msfusion.data.federated import FederatedData, example_inputs
from msfusion.errors import ConfigError
from msfusion.extras import needing
from msfusion.imports import in_one_line
from msfusion.objectives import logits_of
from msfusion.target_scale import TargetScale

Form = Literal["program", "onnx"]

FILES: Mapping[Form, str] = {"program": "model.pt2", "onnx": "model.onnx"}
TRIED = (1, 2, 5)
"""Numbers of examples on which a program has to answer as the model does."""

CLOSE = 1e-4


def write_program(model: nn.Module, data: FederatedData, folder: Path, form: Form) -> None:
    """Write a model as a program into a folder.

    Raises ConfigError where that is not possible, the program answers otherwise, or (onnx) packages are missing.
    """
    shown = example_inputs(data)
    names = list(shown) if isinstance(shown, Mapping) else [f"input_{place}" for place in range(len(shown))]
    scale = None if data.preprocessing is None else data.preprocessing.targets
    called = _Called(model, names if isinstance(shown, Mapping) else None, scale).eval()
    path = folder / FILES[form]
    with _told(form), _quiet():
        program = _exported(called, _values(shown))
        answers = _WAYS[form](program, path, names)
        _try(called, answers, data)


class _Called(nn.Module):
    """A model as a function of tensors alone, whose result is one tensor."""

    def __init__(
        self, model: nn.Module, names: Sequence[str] | None, scale: TargetScale | None = None
    ) -> None:
        super().__init__()
        self.model, self.names, self.scale = model, names, scale

    def forward(self, *inputs: Tensor) -> Tensor:
        """The logits, or numbers in the units of the targets."""
        if self.names is None:
            outputs = logits_of(self.model(*inputs))
        else:
            outputs = logits_of(self.model(**dict(zip(self.names, inputs, strict=True))))
        return outputs if self.scale is None else self.scale.in_units(outputs)

    def in_spreads(self, answers: Tensor) -> Tensor:
        """Answers in units of what counts as far: the spread of the targets, where that is known."""
        return answers if self.scale is None else answers / self.scale.like(answers)[1]


Answers = Callable[[Sequence[Tensor]], Tensor]
"""What a program that was read again makes of inputs."""


def _exported(called: nn.Module, values: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("examples", min=1)}
    return torch.export.export(called, values, dynamic_shapes=((sizes,) * len(values),), strict=False)


def _as_program(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> Answers:
    torch.export.save(program, path)
    read = torch.export.load(path).module()
    return lambda values: read(*values)


def _as_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> Answers:
    with needing("onnx", "--onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401  # which torch.onnx needs
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, output_names=["outputs"])
    assert made is not None
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answers(values: Sequence[Tensor]) -> Tensor:
        given = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return answers


_WAYS: Mapping[Form, Callable[[torch.export.ExportedProgram, Path, Sequence[str]], Answers]] = {
    "program": _as_program,
    "onnx": _as_onnx,
}


def _try(called: _Called, answers: Answers, data: FederatedData) -> None:
    for count in TRIED:
        values = _values(example_inputs(data, count))
        with torch.no_grad():
            expected = called(*values)
        found = answers(values)
        if found.shape != expected.shape or not torch.allclose(
            called.in_spreads(found), called.in_spreads(expected), rtol=CLOSE, atol=CLOSE
        ):
            raise ConfigError(f"the program answers otherwise than the model, for {count} examples")


def _values(shown: Any) -> tuple[Tensor, ...]:
    return tuple(shown.values()) if isinstance(shown, Mapping) else tuple(shown)


@contextmanager
def _told(form: Form) -> Iterator[None]:
    """Make whatever goes wrong one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of torch.export, torch.onnx or onnxruntime
        raise ConfigError(
            f"the model cannot be written as {FILES[form]} ({type(error).__name__}: {in_one_line(error)}): leave "
            f"--{form} out"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what other libraries say of themselves."""
    talker = logging.getLogger("torch.onnx")
    before = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(before)
