"""The [grow] table: how participants with small models of their own grow a large one together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from msfusion.errors import ConfigError, GrowthError
from msfusion.experiment.config.declared import Section, key_of, section_of
from msfusion.experiment.config.sections import SECURE, SLICES_ONLY, LocalTrainingSection
from msfusion.federated.training import TrainingSettings
from msfusion.folders import digest_of, folder_of
from msfusion.growth.fit import FitSettings
from msfusion.growth.ligo import Form
from msfusion.growth.starts import Start
from msfusion.methods.fedgrow.settings import PRETRAINING, Further, GrowSettings, Growth, Share

if TYPE_CHECKING:

    class FitSection(Section):
        """The keys of FitSettings."""

    class StartSection(Section):
        """The keys of Start."""
else:
    FitSection = section_of(FitSettings, without=("seed",))
    StartSection = section_of(Start)


def _checked_small(value: Any) -> Any:
    """A list of tables and texts. Raises ValueError, which pydantic makes the user's sentence of."""
    if isinstance(value, list) and all(isinstance(each, dict | str) for each in value):
        return value
    raise ValueError(
        "should be a list of the options in which small models differ from the target, as in "
        "[{ features = 64, layers = 2 }], or of folders that save_pretrained wrote"
    )


class GrowSection(Section):
    """For method.name = 'fedgrow': [model] is the target, and here is what it grows from.

    Small models and the intermediate are the target with other options; a small model may instead be a folder that
    `save_pretrained` wrote, with its weights. Where there are fewer of them than participants, these take them in turn.
    What a growth does not need (all but "ligo": intermediate, share, growth_rounds, fit, start, form, tied; "scratch":
    small) may stand there all the same, so that rivals differ in one key.
    """

    small: Annotated[list[dict[str, Any] | str], BeforeValidator(_checked_small)] = Field(
        default=[], description="participants' models: options that differ from the target's, or a folder"
    )
    intermediate: dict[str, Any] | None = Field(
        default=None, description="options that differ from the target's; for growth = 'ligo' alone"
    )
    growth: Growth = key_of(GrowSettings, "growth")
    share: Share = key_of(GrowSettings, "share")
    further: Further = key_of(GrowSettings, "further")
    growth_rounds: int | None = key_of(GrowSettings, "growth_rounds")
    pretraining: LocalTrainingSection | None = key_of(GrowSettings, "pretraining", default=None)
    fit: FitSection = key_of(GrowSettings, "fit", default_factory=FitSection)
    further_training: LocalTrainingSection | None = key_of(GrowSettings, "further_training")
    start: StartSection = key_of(GrowSettings, "start", default_factory=StartSection)
    form: Form = key_of(GrowSettings, "form")
    tied: bool = key_of(GrowSettings, "tied")
    digests: dict[str, str] = Field(
        default={},
        description="of the folders in small; filled in when a run begins, to notice other weights",
    )

    meaningless: ClassVar[tuple[str, ...]] = (*SLICES_ONLY, *SECURE)
    """Other keys, which have no meaning for Fed-Grow (yet)."""

    def settings(self, training: TrainingSettings) -> GrowSettings:
        """What the method takes; `training` is that of a round. Raises ConfigError for stages that do not fit."""
        if self.growth != "scratch" and not self.small:
            raise ConfigError(
                "small should list the participants' models, as in [{ features = 64, layers = 2 }]"
            )
        learns = self.growth == "ligo"
        if learns and self.intermediate is None:
            raise ConfigError("intermediate should say to what everybody's model grows first")
        if learns and training.rounds is not None and (self.growth_rounds or 0) >= training.rounds:
            raise ConfigError(
                f"growth_rounds is {self.growth_rounds}, which leaves nothing of the {training.rounds} rounds "
                "for what comes further"
            )
        own, after = self.pretraining, self.further_training
        try:
            return self.made(
                GrowSettings,
                share=self.share if learns else "operator",
                growth_rounds=self.growth_rounds if learns else None,
                pretraining=PRETRAINING if own is None else own.made(TrainingSettings, rounds=1),
                fit=self.fit.made(FitSettings),
                training=training,
                further_training=None
                if after is None
                else after.made(TrainingSettings, rounds=training.rounds),
                start=self.start.made(Start),
            )
        except GrowthError as error:
            raise ConfigError(str(error)) from error

    def digests_now(self) -> dict[str, str]:
        """A digest of what is in each folder of `small`; folders that are missing are left out."""
        names = [name for name in self.small if isinstance(name, str)]
        folders = {name: folder_of(name) for name in names}
        return {name: digest_of(path) for name, path in folders.items() if (path / "config.json").is_file()}

    def small_of(self, participant: int) -> Mapping[str, Any] | str:
        """The small model of a participant."""
        return self.small[participant % len(self.small)]
