"""Which updates of a round count: one bad participant is left out, by name, or ends the run.

A round is judged when all its answers are there, and in the order of the participants' numbers. So the order of arrival
and the number of workers decide nothing, and neither does a resume.

    1.  an update is bad by itself      the training came to no end, a tensor is missing, values are not finite or
                                        absurd, the number of examples is not the one known at the start
    2.  an update is too large          it changes what was sent by more than `max_update_norm` times the median of the
                                        round, and by more than what was sent is itself, or by 2**40 times that; or its
                                        loss is a million times the median of the round
    3.  the method cannot use it        `aggregate` raises an UpdateError that names its participant

The *norm* of an update is the root mean square of its changes: the l2 norm of (what came back - what was sent), divided
by the square root of the number of entries, so that sub-models of different widths compare. The median is that of the
updates which passed 1 and changed anything (of an even number the lower of the two in the middle, so that half of them
cannot raise it); of fewer than three it says nothing. The second half
of 2 is for honest rounds in which most participants have nothing left to learn: with stochastic gradient descent on
labels that hardly mix, one norm was seen to be 10.5 times the median, and still smaller than the model's own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from msfusion.errors import DataError, MsfusionError, SumError, UpdateError
from msfusion.federated.held import Held
from msfusion.federated.method import ABSURD, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.results import LeftOut
from msfusion.federated.verdict import Norm, Verdict
from msfusion.setting import check, setting
from msfusion.width.groups import State

BadUpdate = Literal["leave-out", "stop"]

ABSURD_COUNT = 2.0**31
"""No counter of a model, such as the mini-batches that a BatchNorm has seen, grows by as much in a round."""

ABSURD_LOSS = 1e6
"""A loss that is so many times the median of its round, and 1, is none: the round's mean would say nothing else."""

ABSURD_CHANGE = 2.0**40
"""No training changes tensors by so many times what they were, and 1: not even the variances of raw figures."""

FEWEST = 3
"""Of fewer updates the median says nothing: of two, nobody knows which is the odd one."""


@dataclass(frozen=True)
class Screening:
    """What becomes of bad updates. Raises ConfigError, naming the setting."""

    bad_update: BadUpdate = setting(
        "leave-out",
        "of a participant whose update is no good: the round goes on without it, or the run stops with an error",
    )
    max_update_norm: float = setting(
        20.0,
        "times the median of the round; an update that changes more, and more than what was sent is itself, is bad; "
        "0 is any",
        fits=lambda norm: norm == 0 or 1 <= norm < math.inf,
        wanted="at least 1 (times the median of the round), or 0 for any",
    )
    max_examples: int | None = setting(
        None,
        "the most examples that one may have; by default any number in one process, and over a network as many as the "
        "server's own [data] has in all (by data.own 10 million)",
        ge=1,
    )

    def __post_init__(self) -> None:
        check(self)

    def check_examples(self, examples: Iterable[int]) -> None:
        """Raise DataError, naming the participant, where one has more examples than are allowed."""
        for participant, count in enumerate(examples):
            if self.max_examples is not None and count > self.max_examples:
                raise DataError(
                    f"participant {participant} has {count} examples, more than participants.max_examples "
                    f"({self.max_examples}): give it fewer, or allow more"
                )


DEFAULT = Screening()
"""Bad updates are left out."""


class Answers:
    """What the participants of one round have answered, until all of it is there.

    `reasons` say who is left out and why; `memories` are what participants will keep if they are not. `unit` is
    `Scoring.unit`.
    """

    def __init__(self, screening: Screening, unit: float = 1.0) -> None:
        self.screening, self.unit = screening, unit
        self.norms: dict[int, Norm] = {}
        self.losses: dict[int, float] = {}
        self.reasons: dict[int, str] = {}
        self.memories: dict[int, State] = {}
        self._errors: dict[int, MsfusionError | None] = {}
        self._held = Held()

    def add(self, update: Update, norm: Norm, fault: str | None) -> None:
        """Note one participant's update, its norm, and what is wrong with it by itself (`fault_of`)."""
        if fault is not None:
            self.leave_out(update.participant, fault)
            return
        self.norms[update.participant], self.losses[update.participant] = norm, update.loss
        self._held.add(update)

    def leave_out(self, participant: int, reason: str, error: MsfusionError | None = None) -> None:
        """The participant's work does not count. `error` is what ends the run instead where it is to stop."""
        self.reasons[participant] = reason
        self._errors[participant] = error
        self._held.drop(participant)

    def merged(
        self, merge: Callable[[State, Iterable[Update]], dict[str, Tensor]], state: State
    ) -> dict[str, Tensor]:
        """What a method's `merge` makes of the state and the good updates; the state itself where there are none.

        Each update counts once: those that come afterwards are judged and merged by themselves.
        Raises UpdateError, or why a participant's training came to no end, where a bad one is to stop the run: of
        several, that of the lowest number.
        """
        too_large = too_large_in(self.norms, self.screening.max_update_norm)
        for participant, reason in {**absurd_losses(self.losses, self.unit), **too_large}.items():
            self.leave_out(participant, reason)
        self.norms, self.losses = {}, {}
        while True:
            self.stop_if_asked()
            if not len(self._held):
                return dict(state)
            try:
                merged = merge(state, self._held.updates())
            except UpdateError as error:
                if error.participant is None or error.participant in self.reasons:
                    raise
                self.leave_out(error.participant, str(error), error)
                continue
            self._held.close()
            self._held = Held()
            return merged

    def stop_if_asked(self) -> None:
        """Raise the error of the lowest participant that is left out, where a bad one is to stop the run."""
        if self.screening.bad_update == "stop" and self._errors:
            self.stop("with method.bad_update = 'leave-out' the run would go on without it")

    def stop_if_all_are_bad(self, answered: int, participants: int) -> None:
        """Raise the error of the lowest participant where the work of nobody counts of the `answered` that did any.

        That is no bad participant: it is the learning rate, the model, or the method's own code. But one that was there
        alone, of a federation of several `participants`, ends no run; neither does a sum that was not opened.
        """
        if any(isinstance(error, SumError) for error in self._errors.values()):
            return
        if len(self._errors) == answered >= min(2, participants):
            self.stop(
                "nobody's work of this round counts, so look for what all have in common (the learning rate)"
            )

    def stop(self, remark: str) -> NoReturn:
        """Raise the error of the lowest participant that is left out; one of ours says the remark too."""
        participant = min(self._errors)
        raise self._errors[participant] or UpdateError(
            f"participant {participant}: {self.reasons[participant]}; {remark}", participant
        )

    def left_out(self, round_index: int, before: str = "") -> list[LeftOut]:
        """Who is left out of what began in a round; `before` comes before each reason."""
        return [LeftOut(who, round_index, before + why) for who, why in sorted(self.reasons.items())]

    def close(self) -> None:
        """Let go of the updates."""
        self._held.close()


def too_large_in(norms: Mapping[int, Norm], factor: float) -> dict[int, str]:
    """The participants whose updates change too much: by themselves, or for their round. Nobody where `factor` is 0."""
    return {**absurd_changes(norms), **outliers(norms, factor)} if factor else {}


def absurd_changes(norms: Mapping[int, Norm]) -> dict[int, str]:
    """The participants whose updates change more than any training does, each with the reason, however few there are.

    Where participants come one after the other there is nobody to compare with.
    """
    return {
        participant: f"the norm of its update is {norm.change:.3g}, and that of what it was sent {norm.sent:.3g} "
        "(method.max_update_norm = 0 is any)"
        for participant, norm in sorted(norms.items())
        if norm.change > ABSURD_CHANGE * max(1.0, norm.sent)
    }


def outliers(norms: Mapping[int, Norm], factor: float) -> dict[int, str]:
    """The participants whose updates change too much for their round, each with the reason.

    Nobody where `factor` is 0, or fewer than FEWEST changed anything.
    """
    changed = [norm.change for norm in norms.values() if norm.change > 0]
    if factor == 0 or len(changed) < FEWEST:
        return {}
    median = statistics.median_low(changed)
    return {
        participant: f"the norm of its update is {norm.change / median:.3g} times the median of the round "
        f"(method.max_update_norm is {factor:g})"
        for participant, norm in sorted(norms.items())
        if norm.change > factor * median and norm.change > norm.sent
    }


def absurd_losses(losses: Mapping[int, float], unit: float = 1.0) -> dict[int, str]:
    """The participants whose loss is impossible beside the others' of their round, each with the reason.

    Nobody where fewer than FEWEST have told one. `unit` is `Scoring.unit`.
    """
    if len(losses) < FEWEST:
        return {}
    median = statistics.median_low(map(abs, losses.values()))
    return {
        participant: f"its loss is {loss:g}, and the median of the round is {median:.3g}"
        for participant, loss in sorted(losses.items())
        if abs(loss) > ABSURD_LOSS * max(unit, median)
    }


def verdict_of(update: Update, sent: State, declared: Outbound, examples: int, unit: float = 1.0) -> Verdict:
    """What is to be said of an update by itself, which answers tensors that were `sent`."""
    fault = fault_of_names(update, declared) or fault_of(update, sent, examples, unit)
    return Verdict(Norm() if fault else norm_of(update.tensors, sent), fault)


def norm_of(tensors: State, sent: State) -> Norm:
    """The norm of an update with these tensors, against what was `sent` under their names.

    What was not sent counts as if it had been zero.
    """
    sent = _real(sent)
    floating = {name: tensor for name, tensor in _real(tensors).items() if tensor.is_floating_point()}
    entries = sum(tensor.numel() for tensor in floating.values())
    changes, sizes = 0.0, 0.0
    for name, tensor in floating.items():
        before = sent.get(name)
        changes += float(_changes(tensor, before).square_().sum())
        sizes += 0.0 if before is None else float(_changes(before, None).square_().sum())
    return Norm(math.sqrt(changes / entries), math.sqrt(sizes / entries)) if entries else Norm()


def fault_of(update: Update, sent: State, examples: int, unit: float = 1.0) -> str | None:
    """What is wrong with an update by itself, as a sentence about its participant; None where nothing is.

    `sent` are the tensors that it answers, `examples` how many the participant had at the start, `unit` is
    `Scoring.unit`.
    """
    if (wrong := fault_of_count(update, examples)) is not None:
        return wrong
    if not abs(update.loss) < ABSURD * unit:
        return f"its loss is {update.loss:g}"
    fault = fault_of_values(update.tensors, sent)
    if fault is not None and examples == 1:
        fault += "; it has a single example, which BatchNorm cannot normalise: give it a second one"
    return fault


def fault_of_count(update: Update, examples: int) -> str | None:
    """What is wrong with the number of examples in an update, as `fault_of` says it."""
    if update.examples == examples:
        return None
    return f"it says that it has {update.examples} examples, and had {examples} at the start"


def fault_of_names(update: Update, declared: Outbound) -> str | None:
    """What an update lacks of the tensors that its method declares, as `fault_of` says it."""
    missing = declared.tensors.keys() - declared.optional - update.tensors.keys()
    if not missing:
        return None
    return (
        f"its update lacks {len(missing)} tensors that the method declares, among them {min(missing)!r}: they have to "
        "come back, or to be among the optional ones of `outbound`"
    )


def fault_of_values(tensors: State, sent: State) -> str | None:
    """What is wrong with the values of some tensors, as `fault_of` says it. What did not change is never wrong."""
    sent = _real(sent)
    for name, tensor in _real(tensors).items():
        if not tensor.numel() or tensor.dtype == torch.bool:
            continue
        before = sent.get(name)
        if tensor.is_floating_point():
            largest = float(tensor.detach().abs().max())
            if math.isfinite(largest) and largest < ABSURD:
                continue
            changed = tensor if before is None or before.shape != tensor.shape else tensor[tensor != before]
            largest = float(changed.detach().abs().max()) if changed.numel() else 0.0
            if not math.isfinite(largest):
                return f"tensor {name!r} of its update has values that are not finite (NaN or infinite)"
            if largest >= ABSURD:
                return f"tensor {name!r} of its update has values as large as {largest:.3g}"
        elif float(_changes(tensor, before).abs_().max()) >= ABSURD_COUNT:
            return f"tensor {name!r} of its update has counts as large as {int(tensor.max())}"
    return None


def _real(tensors: State) -> State:
    """The tensors, complex ones as pairs of real numbers."""
    return {
        name: torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
        for name, tensor in tensors.items()
    }


def _changes(tensor: Tensor, before: Tensor | None) -> Tensor:
    """A new float64 tensor: the tensor, minus what was sent where that has its shape."""
    values = tensor.detach().to(torch.float64, copy=True)
    return values if before is None or before.shape != tensor.shape else values.sub_(before.detach())
