"""The errors that a user can meet. Every one carries a single sentence: what is wrong, where, what to do."""

from msfusion.quoting import sentence


class MsfusionError(ValueError):
    """A mistake in what the user gave us: the command line prints the sentence and exits with code 2.

    The sentence quotes names and values of others: they are shown as text, and not whole where they are very long.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(sentence(message))


class UntraceableModelError(MsfusionError):
    """The width map of a model cannot be found, or what was found cannot be proved.

    The message names the module and the operation at which tracing or the proof failed.
    """


class UpdateError(MsfusionError):
    """A participant's update does not fit the global model: wrong names, shapes, dtypes, weight, or not finite.

    `participant` is whose it is, where that is known: an engine can then go on without it.
    """

    def __init__(self, message: str, participant: int | None = None) -> None:
        super().__init__(message)
        self.participant = participant


class PrivacyError(UpdateError):
    """A participant would send what its method does not declare: nothing of it leaves."""


class GrowthError(MsfusionError):
    """One model cannot be grown into another: other families, a smaller target, layers or tensors that are missing."""


class ConfigError(MsfusionError):
    """A configuration that cannot be run: unknown keys, impossible values, missing files."""


class DataError(MsfusionError):
    """Data that cannot be loaded, partitioned or trained on."""


class TrainingError(MsfusionError):
    """Training that cannot go on: a loss that is not finite, a model that returns something odd."""


class RunDirectoryError(MsfusionError):
    """A run directory that exists already, is missing, is damaged, or cannot be written."""


class CodecError(MsfusionError):
    """A tensor that a codec cannot carry, or bytes that are not a message of a codec: damaged, cut off or lying."""


class CutError(MsfusionError):
    """A model cannot be cut in two at the module that was named."""


class StreamError(MsfusionError):
    """A participant and the server that cannot go on: wrong token, other settings, bad messages, nobody there.

    `status` is the name of the gRPC status with which a stream is ended for it.
    """

    def __init__(self, message: str, status: str = "INVALID_ARGUMENT") -> None:
        super().__init__(message)
        self.status = status


class SumError(MsfusionError):
    """The sum of a round's updates cannot be had without a single one becoming known: the model stays as it was.

    So it is where too few participants are left, or somebody says what cannot be (`federated.secure_sums`). A run
    goes on after it.
    """


class CheckError(MsfusionError):
    """A part that somebody wrote breaks a law that all parts of its kind must keep (`msfusion.checks`)."""
