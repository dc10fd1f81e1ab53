"""What decides the results of a run: its configuration, its data, and whatever of a user's else it runs on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from msfusion.errors import RunDirectoryError
from msfusion.experiment.config import Config
from msfusion.experiment.config.keys import flattened
from msfusion.files import digest_of_json
from msfusion.folders import digest_of, folder_of
from msfusion.imports import is_reference, source_digests
from msfusion.models.build import BUILT_IN
from msfusion.models.huggingface import is_transformers

_DATA = {
    "training": "other examples of the participants",
    "test": "another test set",
    "meaning": "labels or tokens of another meaning",
}


@dataclass(frozen=True)
class Fingerprint:
    """Digests of all that a run began with; a run goes on only where they are the same.

    config: of the configuration, width ratios worked out. data: as `FederatedData.digests`. code: by setting, of a
    model's folder; by setting and file, of the source of a `module:function`. model: of what the model computes, as
    `model_digest`.
    """

    config: str
    data: Mapping[str, str]
    code: Mapping[str, str]
    model: str

    @cached_property
    def digest(self) -> str:
        """One for all of them."""
        return digest_of_json(asdict(self))

    def refuse_other_code(self, code: Mapping[str, str], config: Config, run: object) -> None:
        """Raises RunDirectoryError, naming the setting, where its source or folder is not what `run` began with."""
        for key in sorted({*self.code, *code}):
            if self.code.get(key) != code.get(key):
                setting, _, file = key.partition(" ")
                name = flattened(config.to_table()).get(setting)
                if file:
                    raise RunDirectoryError(
                        f"the file {file}, which {setting} = '{name}' runs, has changed since the run in {run} began "
                        "(even another comment counts): put back what it was, or choose another --out."
                    )
                raise RunDirectoryError(
                    f"{setting} = '{name}' has changed since the run in {run} began: put back what it was, or choose "
                    "another --out."
                )

    def refuse_other_model(self, model: str, config: Config, run: object) -> None:
        """Raises RunDirectoryError where the model computes something else than when `run` began."""
        if self.model != model:
            raise RunDirectoryError(
                f"model.name = '{config.model_spec.name}' gives another model than when the run in {run} began: its "
                "operators, constants or shapes have changed; put back what it is made from (a file "
                "that its function reads, the version of a library), or choose another --out."
            )

    def refuse_other_data(self, data: Mapping[str, str], config: Config, run: object) -> None:
        """Raises RunDirectoryError, saying what of it differs, where the data is not what `run` began with."""
        for part, told in _DATA.items():
            if self.data.get(part) != data[part]:
                raise RunDirectoryError(
                    f"data.source = '{config.data_spec.source}' has changed since the run in {run} began: it gives "
                    f"{told} now; put back what it was, or choose another --out."
                )

    def refuse_other_config(self, config: Config, run: object) -> None:
        """Raises RunDirectoryError where the configuration comes to something else than when `run` began."""
        if self.config != config.fingerprint():
            raise RunDirectoryError(
                f"the configuration of the run in {run} comes to other settings than when it began, such as the "
                "widths that budgets allow; choose another --out."
            )


def code_of(config: Config) -> dict[str, str]:
    """Digests of the user's functions and folders that a run is made from, as in `Fingerprint`. Raises ConfigError."""
    code: dict[str, str] = {}
    for reference, setting in references_of(config):
        code |= _by_file(reference, setting)
    name = config.model_spec.name
    if name not in BUILT_IN and is_transformers(name) and (folder_of(name) / "config.json").is_file():
        code["model.name"] = digest_of(folder_of(name))
    return code


def references_of(config: Config) -> Iterator[tuple[str, str]]:
    """The user's functions of which a run is made, as `module:function`, and their keys."""
    model = config.model_spec.name
    for name, setting in (
        (config.data_spec.source, "data.source"),
        (config.method.name, "method.name"),
        (config.method.schedule, "method.schedule"),
        (config.method.average, "method.average"),
        (config.training.loss, "training.loss"),
        *((name, "evaluation.metrics") for name in config.evaluation.metrics),
        *_codecs(config),
    ):
        if is_reference(name):
            yield name, setting
    if model not in BUILT_IN and not is_transformers(model) and is_reference(model):
        yield model, "model.name"


def _codecs(config: Config) -> Iterator[tuple[str, str]]:
    """The names of codecs, and their keys."""
    keys = [("method", "codec"), ("method", "codec_down")]
    if config.split is not None:
        keys += [("split", "activations"), ("split", "gradients")]
    for table, key in keys:
        given = getattr(getattr(config, table), key)
        name = given.get("codec") if isinstance(given, Mapping) else given
        if isinstance(name, str):
            yield name, f"{table}.{key}"


def _by_file(reference: str, setting: str) -> dict[str, str]:
    return {f"{setting} {file}": digest for file, digest in source_digests(reference, setting).items()}


def model_digest(outlines: Iterable[str]) -> str:
    """A digest of what models compute, from `WidthMap.outline()`: not of the weights with which they begin.

    Another kind of processor draws other weights, and a run that goes on, or is exported, has its own.
    """
    return digest_of_json(list(outlines))
