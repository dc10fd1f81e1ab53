"""A trained model as a folder that other programs can load.

- of `transformers`: what `save_pretrained` writes, and the tokenizer's files where data.tokenizer is such a folder
- any other: `model.safetensors`, and in `model.json` the name and options with which `build_model` makes it; a small
  model, a sum of blocks and an ensemble are made of narrow copies (`models.several`)
- `vocabulary.json`, a list of all tokens by their id, where the vocabulary was made of the training texts
- `preprocessing.json`: how raw examples become inputs, and what the classes are called (`data.preprocessing`)
- `model.pt2`, `model.onnx`: where asked for, a program of torch.export or of ONNX (`experiment.program`)
- `README.md`: what the model is, how it was trained, and how good it is (`experiment.card`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.data.spec import is_pretrained
from msfusion.data.text import pretrained_tokenizer
from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.experiment.card import model_card
from msfusion.experiment.config import Config, config_of_run
from msfusion.experiment.config.targets import loss_name
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.fingerprint import code_of, model_digest
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.kinds import kind_of
from msfusion.experiment.program import Form, write_program
from msfusion.experiment.setup import Setup, is_scored_by_classes, prepare, settle_process, traced
from msfusion.federated.method import Method
from msfusion.files import read_tensors, write_folder_with, write_json, write_tensors, write_text
from msfusion.folders import VOCABULARY
from msfusion.imports import is_reference
from msfusion.models.build import build_model, full_options
from msfusion.models.several import options_of, several
from msfusion.models.spec import ModelSpec
from msfusion.predictor import MODEL


def export(path: Path, out: Path, participant: int | None = None, also: Sequence[Form] = ()) -> list[Path]:
    """Write the model of the finished run in `path` to the folder `out`, whole or not at all, and return its files.

    `participant`: whose model, for Fed-Grow, which gives each its own. `also`: programs to write besides.
    Raises RunDirectoryError where the run is not finished, is damaged, or its data or code have changed since, and
    where `out` holds files; ConfigError where there is no such model, or program; and what loading the data raises.
    """
    settle_process()  # as the run did: the same data, bit for bit
    directory = RunDirectory.reopen(path)
    if not directory.finished:
        raise RunDirectoryError(f"the run in {path} is not finished; go on with it by --resume.")
    RunDirectory.check_free(out, "choose another --out, or remove it")
    config = config_of_run(directory.config)
    directory.check_end()
    directory.read_fingerprint().refuse_other_code(code_of(config), config, path)
    find = _grown if kind_of(config.method.name).personal else _common
    model, data, spec = find(config, directory, participant)
    summary = directory.read_summary()

    def write(folder: Path) -> None:
        _write(folder, model, config, data, spec)
        for form in also:
            write_program(model, data, folder, form)
        write_text(folder / "README.md", model_card(model, data, config, summary))

    write_folder_with(out, write)
    return sorted(out.iterdir())


Found = tuple[nn.Module, FederatedData, ModelSpec]
"""The model, the data of its run, and how a model of its shapes is made."""


def _common(config: Config, directory: RunDirectory, participant: int | None) -> Found:
    """The model that all participants trained together."""
    if participant is not None:
        raise ConfigError(
            f"all participants of {config.method.name} share one model: leave --participant out."
        )
    settings = config.method_settings
    if settings is not None and settings.own_models is not False:
        setup = prepare(config)
        if setup.method.trains_own_models:
            return _own(setup, setup.method, directory)
    data = load_data(config.data_spec)
    model = build_model(config.model_spec, data)
    data = data.for_model(model)
    began = directory.read_fingerprint()
    began.refuse_other_data(data.digests, config, directory.path)
    if is_reference(config.model_spec.name):  # which may read what is no source
        outline = traced(model, data, is_scored_by_classes(config, data)).outline()
        began.refuse_other_model(model_digest([outline]), config, directory.path)
    return _with_tensors(model, read_tensors(directory.model)[0]), data, config.model_spec


def _own(setup: Setup, method: Method, directory: RunDirectory) -> Found:
    """A small model, or several as one: narrow copies of the model of the configuration."""
    config, began = setup.config, directory.read_fingerprint()
    began.refuse_other_data(setup.data.digests, config, directory.path)
    began.refuse_other_model(model_digest([setup.width_map.outline()]), config, directory.path)
    model = _with_tensors(method.whole, read_tensors(directory.model)[0])
    shown = Batch(example_inputs(setup.data), setup.data.test.targets)
    options = options_of(model, setup.capacities.smallest, config.model_spec, setup.data, shown)
    return model, setup.data, ModelSpec(f"{several.__module__}:{several.__name__}", options)


def _grown(config: Config, directory: RunDirectory, participant: int | None) -> Found:
    """A participant's grown model, or the target that they averaged."""
    run, count = GrowRun(config), config.participants.count
    began = directory.read_fingerprint()
    began.refuse_other_data(run.data.digests, config, directory.path)
    began.refuse_other_model(run.model_digest, config, directory.path)
    state, _ = read_tensors(directory.model)
    personal = run.method.personal(state)
    if personal == (participant is None):
        raise ConfigError(
            f"every participant of this run has a model of its own: say whose, by --participant 0 to "
            f"{count - 1}."
            if personal
            else "the participants of this run share one model: leave --participant out."
        )
    task = run.method.examination(state, config.rounds - 1, participant or 0)
    if participant is not None:
        if not 0 <= participant < count:
            raise ConfigError(f"there is no participant {participant}: give --participant 0 to {count - 1}.")
        checkpoint = directory.load_checkpoint(began.digest)
        if checkpoint is None or checkpoint.rounds != config.rounds:
            raise RunDirectoryError(
                f"the last checkpoint in {directory.path} is gone, and with it what participant {participant} kept; "
                "delete its summary.json and go on with --resume, which makes it again."
            )
        if participant not in checkpoint.memories:
            raise ConfigError(f"participant {participant} has no model: it took part in no round.")
        task = replace(task, memory=checkpoint.memories[participant])
    grown = run.method.grown(task)
    assert grown is not None  # it has a memory, or there is a common target
    return _with_tensors(run.method.target, grown), run.data, config.model_spec


def _with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(dict(tensors))
    return model.eval()


def _write(folder: Path, model: nn.Module, config: Config, data: FederatedData, spec: ModelSpec) -> None:
    save: Any = getattr(model, "save_pretrained", None)
    tokenizer = config.data_spec.tokenizer or ""
    if save is not None:
        save(folder)
    else:
        write_tensors(folder / "model.safetensors", model.state_dict(), {"format": 1})
        write_json(folder / MODEL, {"name": spec.name, "options": full_options(spec, data)})
    if data.preprocessing is None:
        if data.tokens:
            write_json(folder / VOCABULARY, list(data.tokens))
    else:
        loss, metrics = loss_name(config.training, data), tuple(config.evaluation.metrics)
        replace(data.preprocessing, loss=loss, metrics=metrics).write(folder)
    if is_pretrained(tokenizer):
        pretrained_tokenizer(tokenizer).save_pretrained(folder)
