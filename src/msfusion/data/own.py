"""Data that participants have of their own, encoded by a reference that all of them know.

Labels, words and pixels become numbers by what the training split of `data.source` has, for everybody alike: the
classes in its order, its vocabulary, its mean and variance. Nobody trains on it.
"""

from __future__ import annotations

from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.data.function import call_function
from msfusion.data.hub import load_own_split
from msfusion.data.loaded import Loaded, check_batches
from msfusion.data.spec import PARTICIPANT, DataSpec
from msfusion.errors import ConfigError, DataError
from msfusion.imports import is_reference
from msfusion.target_scale import TargetScale

FARTHEST = 1e6
"""Standard deviations: so far from the numbers of the reference lie none of the same kind."""


def with_own(reference: Loaded | FederatedData, spec: DataSpec) -> FederatedData:
    """What each participant has at the place that `spec.own` says, and the reference's test set.

    Raises ConfigError where settings say how to share out what is not shared, or a built-in source is the reference;
    DataError, naming the participant, where its data cannot be loaded or is no such data as the reference.
    """
    shares = {"data.partition": spec.partition, "data.partition_column": spec.partition_column}
    for key, value in shares.items():
        if value is not None:
            raise ConfigError(
                f"{key} shares out data.source, but by data.own each has its own: leave it out."
            )
    if not isinstance(reference, Loaded):
        raise DataError(
            f"data.source = '{spec.source}' gives each participant its examples, and data.own too: leave one out."
        )
    reference.check()
    places = places_of(spec)
    participants = tuple(_own(place, who, reference, spec) for who, place in enumerate(places))
    here = {f"participant {who}": own for who, own in enumerate(participants) if isinstance(places[who], str)}
    # the test set first: whoever differs from it is to blame
    meant = reference.classes, reference.vocabulary_size, reference.task
    check_batches({"the test set": reference.test, **here}, *meant)
    if reference.preprocessing is not None and reference.preprocessing.targets is not None:
        for holder, own in here.items():
            _check_scale(holder, own.targets, reference.train.targets, reference.preprocessing.targets)
    return reference.among(participants)


def _check_scale(holder: str, own: Tensor, known: Tensor, scale: TargetScale) -> None:
    """Raise DataError for numbers that cannot be learnt on the scale of those that are `known` of the reference."""
    largest = scale.scaled(own.double()).abs().amax(0)
    same = (known.amin(0) == known.amax(0)) & (scale == TargetScale.fitted(known))
    for number, spreads in enumerate(largest.tolist()):
        if bool(same[number]) and spreads > 0:
            raise DataError(
                f"the numbers that are to be predicted differ in the data of {holder}, and in the training split of "
                f"data.source all are {float(known[0, number]):g}, so that nobody knows how far they lie apart: give "
                "it examples with others, or set data.normalise_targets = false."
            )
        if spreads > FARTHEST:
            raise DataError(
                f"a number that is to be predicted in the data of {holder} lies {spreads:.3g} standard deviations from "
                "the mean of those in the training split of data.source: is it of the same kind, and in the same unit?"
            )


def places_of(spec: DataSpec) -> tuple[str | int, ...]:
    """For each participant where its data is, or how many examples it has elsewhere.

    Raises ConfigError where these are more or fewer than there are participants.
    """
    own, count = spec.own, spec.participants
    assert own is not None
    if isinstance(own, str):
        return tuple(own.replace(PARTICIPANT, str(who)) for who in range(count))
    if len(own) != count:
        raise ConfigError(
            f"data.own names the data of {len(own)} participants, but participants.count = {count}: make them equal."
        )
    return tuple(own)


def _own(place: str | int, participant: int, reference: Loaded, spec: DataSpec) -> Batch:
    if isinstance(place, int):
        return reference.test.repeated(place)
    if is_reference(place):
        return call_function(
            place, f"data.own of participant {participant}", {**spec.options, "participant": participant}
        )
    if is_reference(spec.source) or spec.source in ("digits", "python-docs"):
        raise ConfigError(
            f"data.own = '{place}' is a folder or file, which data.source = '{spec.source}' cannot say how to read: "
            "let data.source be a folder or file of such data, or data.own a module:function."
        )
    return load_own_split(place, participant, spec)
