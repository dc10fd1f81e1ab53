"""What to run: a TOML file, checked key by key, every mistake told in one sentence.

Relative paths in a configuration are relative to the current directory, as on the command line, not to
the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from msfusion.codecs import Codec
from msfusion.data.preprocessing import is_of_numbers
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, MsfusionError
from msfusion.experiment.config.codecs import as_before, codec_of
from msfusion.experiment.config.declared import Section, key_of
from msfusion.experiment.config.errors import about_section, first_mistake
from msfusion.experiment.config.fedgrow import GrowSection
from msfusion.experiment.config.keys import (
    flattened,
    merged,
    parse_override,
    parsed,
    put,
    shown,
    without_none,
)
from msfusion.experiment.config.methods import schema_for, settings_of
from msfusion.experiment.config.network import NetworkSection
from msfusion.experiment.config.participants import ParticipantsSection
from msfusion.experiment.config.sections import (
    SHARDED,
    SLICES_ONLY,
    ComparisonSection,
    DataSection,
    EvaluationSection,
    MethodSection,
    ModelSection,
    RunSection,
    SplitSection,
    TrainingSection,
)
from msfusion.experiment.config.targets import goes_on_with_scale, why_plain
from msfusion.federated.accounting import Privacy
from msfusion.federated.capacities import Capacities
from msfusion.federated.participation import RoundSettings
from msfusion.federated.problem import METHODS, Settings
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import SecureSums
from msfusion.federated.training import TrainingSettings
from msfusion.folders import PREFIX, folder_of, has_tokenizer
from msfusion.imports import in_one_line
from msfusion.methods import HOUSE
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.methods.split.method import SplitSettings
from msfusion.models.spec import ModelSpec
from msfusion.quoting import short
from msfusion.reading import read_at_most
from msfusion.windows.overlap import Feedback, Overlap

BUILT_IN = "the built-in configuration"
_MOST_BYTES = 2**20
_MOST_EXTENDED = 32

_SECTION_OF = {
    "data_spec": "data",
    "model_spec": "model",
    "training_settings": "training",
    "split_settings": "split",
    "grow_settings": "grow",
    "method_settings": "method",
    "codecs": "method",
}
"""The section that each of these properties of a configuration is made of."""

_TURNS = ("method.passes", "method.first_block")
_BLOCKS_ONLY = (*_TURNS, "method.remembered_bytes")
_COPIES_ONLY = ("method.grow_at", "method.apart")
_STARTS: Mapping[str, tuple[str, ...]] = {
    "auto": (*_TURNS, *_COPIES_ONLY),
    "fresh": (*_BLOCKS_ONLY, *_COPIES_ONLY),
    "blocks": (
        *_COPIES_ONLY,
        "method.overlap",
        "method.between_rounds",
        "method.recalibrate",
        "method.contrastive_weight",
    ),
    "copies": _BLOCKS_ONLY,
}
"""By msfusion's start: keys that must stay as they are by default, as they have no meaning for it."""


class Config(Section):
    """A whole run, resolved: every key has its value."""

    seed: int = key_of(DataSpec, "seed")
    rounds: int = key_of(RoundSettings, "rounds", default=20, le=100_000)
    data: DataSection = Field(default_factory=DataSection, description="which data, and who gets what")
    model: ModelSection = Field(default_factory=ModelSection, description="which model, and its weights")
    method: MethodSection = Field(
        default_factory=MethodSection, description="how the participants' work becomes one model"
    )
    split: SplitSection | None = Field(default=None, description="for method.name = 'split' alone")
    grow: GrowSection | None = Field(default=None, description="for method.name = 'fedgrow' alone")
    participants: ParticipantsSection = Field(
        default=ParticipantsSection(), description="who takes part, and how much each can hold"
    )
    training: TrainingSection = Field(
        default_factory=lambda: TrainingSection(), description="how a participant trains in a round"
    )
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="when the fused model is tested, and on what figures"
    )
    network: NetworkSection | None = Field(
        default=None, description="machines and links, for a simulated clock; by default there is none"
    )
    run: RunSection = Field(default=RunSection(), description="how the run is carried out")
    comparison: ComparisonSection | None = Field(
        default=None, description="what `msfusion compare` runs with this configuration"
    )

    @model_validator(mode="after")
    def _one_machine_for_each(self) -> Config:
        machines = None if self.network is None else self.network.machines
        if isinstance(machines, tuple) and len(machines) != self.participants.count:
            raise ValueError(
                f"network.machines should be one table, or one for each of the {self.participants.count} "
                f"participants, not {len(machines)}"
            )
        return self

    @model_validator(mode="after")
    def _the_method_has_what_it_needs(self) -> Config:
        named = f"method.name = '{self.method.name}'"
        if self.own_table is not None:
            section = getattr(self, self.own_table)
            if section is None:
                raise ValueError(
                    f"method.name is '{self.method.name}', which needs a [{self.own_table}] table"
                )
            self._refuse_meaningless(section.meaningless, named)
        if self.method.name not in HOUSE:  # keys of [method] that are others' stay, for a comparison of both
            self._refuse_meaningless(["participants.budget"], named)
        if self.run.engine is not None:
            without = ["run.together"] if self.run.engine == SHARDED else ["run.workers", "run.device"]
            self._refuse_meaningless(without, f"run.engine = '{self.run.engine}'")
        if "method.schedule" not in self.own_keys:
            self._refuse_meaningless(["method.schedule"], named)
        if self.method.name in HOUSE and "method.start" in self.own_keys:
            self._refuse_meaningless(_STARTS[self.method.start], f"method.start = '{self.method.start}'")
        return self

    def _refuse_meaningless(self, keys: Iterable[str], without: str) -> None:
        """ValueError where a key that has no meaning here is set to something else than by default."""
        for key in keys:
            section, _, name = key.rpartition(".")
            table = getattr(self, section) if section else self
            default = type(table).model_fields[name].get_default(call_default_factory=True)
            if getattr(table, name) != default:
                raise ValueError(f"{key} has no meaning for {without}; leave it out")

    @model_validator(mode="after")
    def _own_labels_are_asked_for_where_participants_answer(self) -> Config:
        if self.evaluation.own_labels and self.own_table != "grow":
            raise ValueError(
                f"evaluation.own_labels is for method.name = 'fedgrow', not '{self.method.name}'; leave it out"
            )
        return self

    @property
    def split_settings(self) -> SplitSettings | None:
        """How the model is cut; None without a [split] table. Raises ConfigError on an impossible value."""
        return None if self.split is None else self.split.settings

    @property
    def grow_settings(self) -> GrowSettings | None:
        """The stages of growing together; None without a [grow] table. Raises ConfigError on an impossible value."""
        return None if self.grow is None else self.grow.settings(self.training_settings)

    @property
    def data_spec(self) -> DataSpec:
        """What `load_data` takes. Raises ConfigError on an impossible value.

        Without a data.tokenizer, text becomes tokens as the trained weights learnt them: by the tokenizer in their
        folder.
        """
        made = self.data.made(DataSpec, participants=self.participants.count, seed=self.seed)
        folder = self._trained_on_numbers
        made = replace(
            made,
            normalise_targets=self.normalises_targets,
            scale_of=None if folder is None else str(folder),
        )
        return made if made.tokenizer else replace(made, tokenizer=self._own_tokenizer)

    @property
    def normalises_targets(self) -> bool:
        """Whether a model learns its targets on another scale: where msfusion reads them, and the loss is a distance.

        A loss of the user's own may mean something by the size of what it is given, and so may a function for data.
        A trained model goes on as it has learnt. Raises ConfigError where a setting speaks against that.
        """
        plain = why_plain(self.data, self.training)
        folder = self._trained_on_numbers
        if folder is None:
            return self.data.task == "regression" and plain is None
        return goes_on_with_scale(folder, plain)

    @property
    def _trained_on_numbers(self) -> Path | None:
        """The folder of the trained model that is to go on, where it is one of a regression that was exported."""
        if self.data.task != "regression" or self.model_spec.weights == "random":
            return None
        folder = folder_of(self.model_spec.name)
        return folder if is_of_numbers(folder) else None

    @property
    def _own_tokenizer(self) -> str | None:
        """The tokenizer that stands beside trained weights, as `DataSpec.tokenizer` names it, if there is one."""
        model = self.model_spec
        names = [] if model.weights == "random" else [model.name]
        if self.grow is not None and self.own_table == "grow":
            names += [small for small in self.grow.small if isinstance(small, str)]
        folders = [folder for folder in map(folder_of, names) if has_tokenizer(folder)]
        return f"{PREFIX}{folders[0]}" if folders else None

    @property
    def model_spec(self) -> ModelSpec:
        """What `build_model` takes. Raises ConfigError on an impossible value."""
        return self.model.made(ModelSpec, seed=self.seed)

    @property
    def training_settings(self) -> TrainingSettings:
        """What a participant trains with. Raises ConfigError on an impossible value."""
        return self.training.made(TrainingSettings, rounds=self.rounds)

    @property
    def capacities(self) -> Capacities:
        """The width ratio of each participant in each round."""
        return self.participants.capacities(self.seed)

    @property
    def screening(self) -> Screening:
        """What becomes of a participant whose update is no good."""
        return self.method.made(Screening, max_examples=self.participants.max_examples)

    @property
    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """For what participants send, and for what they are sent. Raises ConfigError on an impossible setting."""
        up, down = (
            None if given is None else codec_of("method", key, given)
            for key, given in (("codec", self.method.codec), ("codec_down", self.method.codec_down))
        )
        return up, down

    @property
    def secure_sums(self) -> SecureSums | None:
        """That the server learns sums alone; None where it sees each update."""
        return None if self.method.secure is None else self.method.secure.made(SecureSums)

    @property
    def privacy(self) -> Privacy | None:
        """The noise that participants add; None where they add none."""
        return None if self.method.privacy is None else self.method.privacy.made(Privacy)

    @property
    def own_table(self) -> str | None:
        """The table of the method's settings, where that is another than [method]."""
        return METHODS[self.method.name].own_table

    @property
    def own_keys(self) -> frozenset[str]:
        """The keys of [method] that are settings of the method itself."""
        if self.own_table is not None:
            return frozenset()
        return frozenset(f"method.{name}" for name in settings_of(METHODS[self.method.name]))

    @property
    def method_settings(self) -> Settings | None:
        """What is chosen of the method; None for those that have a table of their own.

        Raises ConfigError on an impossible value.
        """
        section = self.method
        if self.own_table is not None:
            return None
        worked_out: dict[str, Any] = {}
        if section.name in HOUSE:
            contrastive = section.made(ContrastiveSettings, prefix="contrastive_")
            worked_out = {"overlap": self.overlap, "contrastive": contrastive}
        made = METHODS[section.name]
        chosen = {name: worked_out.get(name, getattr(section, name, None)) for name in settings_of(made)}
        if section.name in HOUSE:
            chosen.pop("ratio")  # of the participants
        try:
            return made(**chosen)
        except MsfusionError:
            raise
        except Exception as error:  # whatever a user's class makes of its settings
            raise ConfigError(
                f"method.name = '{section.name}' refuses its settings ({type(error).__name__}: {in_one_line(error)})"
            ) from error

    def refuse_ignored(self) -> None:
        """Raise ConfigError where a setting of [method] has no meaning for a method that is not of the house.

        A comparison of both has them all; a run of one does not.
        """
        if self.method.name not in HOUSE:
            slices = [each for each in SLICES_ONLY if each.startswith("method.")]
            usual = [*slices, *_BLOCKS_ONLY, "method.blocks", "method.weighting"]
            try:
                self._refuse_meaningless(usual, f"method.name = '{self.method.name}'")
            except ValueError as error:
                raise ConfigError(f"{error}.") from error

    def with_method(self, settings: Settings) -> Config:
        """The same configuration with these settings of the method, that differ in plain values. Raises ConfigError."""
        names = settings_of(type(settings))
        before = self.method_settings
        changes = {
            f"method.{name}": getattr(settings, name)
            for name in names
            if name != "ratio" and getattr(settings, name) != getattr(before, name)
        }
        return self.changed(changes) if changes else self

    @property
    def overlap(self) -> Overlap | Feedback | None:
        """The overlap of msfusion's windows in each round; None where they are spread evenly."""
        section = self.method.overlap
        if section is None:
            return None
        if section.shape == "feedback":
            return section.made(Feedback)
        end = section.start if section.end is None else section.end
        return section.made(Overlap, end=end, rounds=self.rounds)

    def to_table(self) -> dict[str, Any]:
        """Nested plain values, without those that are not set."""
        table: dict[str, Any] = without_none(self.model_dump(mode="json"))
        return table

    def to_toml(self) -> str:
        """The configuration as TOML; reading it back gives an equal one."""
        import tomli_w

        return tomli_w.dumps(self.to_table())

    def deciding(self) -> dict[str, Any]:
        """Everything but what cannot change the results."""
        table = self.to_table()
        table.pop("comparison", None)
        for key in ("workers", "checkpoint_every", "engine"):
            table["run"].pop(key, None)
        table["evaluation"].pop("target_accuracy", None)
        if not self.normalises_targets:
            table["data"].pop("normalise_targets")
        return table

    def fingerprint(self) -> str:
        """Equal for two configurations just when their runs give the same results."""
        table = self.deciding()
        for key in {"activations", "gradients"} & {*table.get("split", {})}:
            table["split"][key] = as_before(table["split"][key])
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    def difference(self, other: Config) -> str | None:
        """One key whose change changes the results, with both values; None where the results are the same."""
        ours, theirs = flattened(self.deciding()), flattened(other.deciding())
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key):
                return f"{key} is {_told(ours, key, shown(None))}, not {_told(theirs, key, 'left out')}"
        return None

    def pinned(self) -> Config:
        """The same configuration with a digest of each folder that small models come from."""
        digests = {} if self.grow is None else self.grow.digests_now()
        return self.changed({"grow.digests": digests}) if digests else self

    def changed(self, changes: Mapping[str, Any], origin: str = "the configuration") -> Config:
        """The same configuration with other values for some dotted keys; `origin` is who wants them.

        Raises ConfigError.
        """
        table = self.to_table()
        if changes.get("method.name", self.method.name) != self.method.name and self.method.name not in HOUSE:
            for key in self.own_keys:  # which the other method does not know
                table["method"].pop(key.partition(".")[2], None)
        for key, value in changes.items():
            put(table, key, value)
        return _checked(table, origin, {})


def _told(flat: Mapping[str, Any], key: str, absent: str) -> str:
    """The value under a key; or where else it stands, as of a list that may be a table: [{...}, {...}] or {...}."""
    if flat.get(key) is not None:
        return shown(flat[key])
    elsewhere = [each for each in flat if each.startswith(f"{key}.") or key.startswith(f"{each}.")]
    return f"given as {elsewhere[0]}" if elsewhere else absent


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (for None the built-in default), then apply `key=value` overrides with dotted keys.

    A file that `extends` another has that file's values where it says nothing itself.
    Raises ConfigError: what is wrong, under which key, in which file.
    """
    origin = BUILT_IN if path is None else str(path)
    table = _table_of(path, origin)
    set_here: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        put(table, key, value)
        set_here[key] = value
    return _checked(table, origin, set_here)


def config_of_run(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration that a run left in its directory, as `load_config` reads it.

    It has every key. One that it lacks is of a later version, and means what the run did without knowing of it.
    """
    overrides = [*overrides]
    config = load_config(path, overrides)
    if "normalise_targets" in config.data.model_fields_set:
        return config
    return load_config(path, [*overrides, "data.normalise_targets=false"])


def _table_of(path: Path | None, origin: str, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, over what the file says that it extends. Raises ConfigError."""
    table = parsed(default_toml() if path is None else _text_of(path), origin)
    extended = table.pop("extends", None)
    if extended is None or path is None:
        return table
    whole = path.resolve()
    if not isinstance(extended, str) or whole in extending:
        raise ConfigError(
            f"{origin}: extends = {shown(extended)} should be another file, not this one again."
        )
    if len(extending) == _MOST_EXTENDED:
        raise ConfigError(f"{origin}: more than {_MOST_EXTENDED} files extend each other.")
    base = path.parent / extended
    return merged(_table_of(base, str(base), (*extending, whole)), table)


def _text_of(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it. Raises ConfigError."""
    try:
        content = read_at_most(path, _MOST_BYTES)
        text = None if content is None else content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no configuration file {short(path)}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{short(path)} cannot be read: it is not UTF-8 text.") from error
    except (OSError, ValueError) as error:  # a ValueError of a path that holds a zero
        reason = getattr(error, "strerror", None) or "there can be no such file"
        raise ConfigError(f"{short(path)} cannot be read: {reason}.") from error
    if text is None:
        raise ConfigError(
            f"{short(path)} cannot be read: it is no configuration, which is shorter than 1 MiB."
        )
    if not text.strip():
        raise ConfigError(
            f"{short(path)} is empty: it should hold a configuration, with at least one setting."
        )
    return text


def default_toml() -> str:
    """The built-in configuration, with its comments."""
    return resources.files("msfusion").joinpath("default.toml").read_text(encoding="utf-8")


def _checked(table: Mapping[str, Any], origin: str, overrides: Mapping[str, Any]) -> Config:
    schema = schema_for(table, Config)
    try:
        config = schema.model_validate(table)
    except ValidationError as error:
        raise ConfigError(first_mistake(error, schema, table, origin, overrides)) from error
    for specification, section in _SECTION_OF.items():
        try:
            getattr(config, specification)
        except ConfigError as error:
            raise ConfigError(
                about_section(error, section, getattr(config, section), origin, overrides)
            ) from error
    return config
