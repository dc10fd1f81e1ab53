"""A model made of copies: the whole and its slices compute what the small model does, over the zoo, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO
from zoo_checks import tensors, traced
from zoo_entry import Entry, Inputs, call

from msfusion.batch import Batch
from msfusion.experiment.report.describe import _images, _labelled_text, _running_text
from msfusion.federated.capacities import Capacities
from msfusion.federated.states import holding, loaded, with_aliases
from msfusion.federated.training import TrainingSettings
from msfusion.methods.copies import CopiesMethod, CopiesSettings, copies_method, moved, transversals
from msfusion.methods.narrow import NarrowMethod
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.width.groups import WidthMap
from msfusion.width.own_scale import folding
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

ROUNDS = 20

IN_OPERATORS = {
    "normalised", "low_rank", "prototypes_2", "prototypes_pairwise", "prototypes_cubic", "prototypes_normalised",
    "within_a_batch", "dora", "BitForImageClassification", "language_lstm", "GemmaForCausalLM", "bounded",
    "bounded_cubic", "pairs", "drawn",
}  # fmt: skip
"""No parameter holds the factor of a sum: it is over activations alone or with a weight that is computed from others,
or of an output layer that is the embedding, fed by an LSTM or by a norm that multiplies with 1 + weight.
"""

NOT_EQUAL = {"sinusoidal_hidden", "by_identity"}
"""A constant that differs from unit to unit, an identity matrix (which tells copies apart): no copies."""

SINGLE = {"MixtralForCausalLM", "Qwen2MoeForCausalLM", "GemmaForCausalLM", "BloomForCausalLM", "gqa_complex"}
"""Operators or casts that know no float64."""

FAST = (
    "resnet_short",
    "patch_transformer",
    "translator",
    "lstm",
    "nanogpt",
    "densenet",
    "normalised",
    "maxout",
    "two_slices",
)


def chosen() -> list[object]:
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(entry, id=entry.name, marks=marks[entry.name in FAST]) for entry in ZOO]


TRACED_ANEW = {
    "lstm", "lstm_both_ways", "gru", "rnn", "projected_lstm", "language_lstm", "gated_loop", "complex", "by_identity",
    "in_place", "DebertaForSequenceClassification",
}  # fmt: skip
"""Their graphs make tensors of the precision in which they were traced."""


def in_precision(inputs: Inputs, dtype: torch.dtype) -> object:
    """Inputs with the numbers that are no integers in another precision."""
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs
    )


@pytest.fixture
def _in_double() -> Iterator[None]:
    """A model that is built and traced in float64 has no constants of float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(entry: Entry) -> tuple[nn.Module, object, CopiesMethod]:
    """A model in float64 with its inputs, and the method on it; where a graph can, on the map of float32."""
    dtype = torch.float32 if entry.name in SINGLE else torch.float64
    torch.set_default_dtype(dtype)
    inputs = in_precision(entry.inputs(2, 7), dtype)
    if entry.name in TRACED_ANEW:
        model = entry.build().eval()
        width_map = trace(model, inputs)
    else:
        torch.set_default_dtype(torch.float32)
        given, _, width_map = traced(entry.name)
        torch.set_default_dtype(dtype)
        model = copy.deepcopy(given).to(dtype)
    return model, inputs, of_copies(model, width_map, (0.25, 0.5, 0.25))


def of_copies(model: nn.Module, width_map: WidthMap, ratios: tuple[float, ...]) -> CopiesMethod:
    """The method on a model, whether it is one of copies or not."""
    capacities, training = Capacities(ratios), (TrainingSettings(),) * len(ratios)
    windows = transversals(capacities, None, between_rounds=True)
    slices = NarrowMethod(
        "msfusion", model, width_map, windows, capacities.typical, training, capacities=capacities
    )
    return copies_method(slices, CopiesSettings())


def apart(found: object, expected: object) -> float:
    """The largest difference, relative to the spread of each tensor."""
    return max(
        float((one - two).abs().max() / (two.std() + 1e-12))
        for one, two in zip(tensors(found), tensors(expected), strict=True)
        if one.is_floating_point() and one.numel() > 1
    )


@pytest.mark.one_in_ci
@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("entry", chosen())
def test_the_whole_and_its_slices_compute_what_the_small_model_does(entry: Entry) -> None:
    model, inputs, method = prepared(entry)
    dtype = None if entry.name in TRACED_ANEW else next(model.parameters()).dtype  # None leaves it as it is
    width_map, small = method.width_map, moved(method._small_start(), method.width_map)
    state = method._copied(small)
    alone = narrow(
        model, width_map, {n: torch.arange(w) for n, w in method.copies.sizes.items()}, scaling=False
    )
    # casts to float32 within a model leave seven digits
    close = 1e-4 if entry.name in SINGLE else 1e-5
    with torch.no_grad():
        expected = call(loaded(alone.to(dtype), small).eval(), inputs)  # type: ignore[arg-type]
        with holding(model, state):
            whole = call(model, inputs)  # type: ignore[arg-type]
        farthest = 0.0
        for round_index in range(ROUNDS):
            for participant in (round_index % 3, 1):
                task = method.assign(state, round_index, participant)
                submodel = method._submodel(method.window(round_index, participant))
                loaded(submodel.to(dtype), with_aliases(task.tensors, width_map.aliases)).eval()
                farthest = max(farthest, apart(call(submodel, inputs), whole))  # type: ignore[arg-type]
    if entry.name in NOT_EQUAL:
        assert farthest > 0.01
        return
    assert farthest < close
    analysis = width_map.program.analysis  # type: ignore[union-attr]
    assert analysis is not None
    assert bool(folding(analysis).left) == (entry.name in IN_OPERATORS)
    if entry.name not in IN_OPERATORS:
        assert apart(whole, expected) < close


@pytest.mark.slow
@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        *(
            pytest.param(each, marks=pytest.mark.release)
            for each in ("convnet", "text_classifier", "decoder_lm")
        ),
    ],
)
def test_the_built_in_models_are_their_slices(name: str) -> None:
    data = {"text_classifier": _labelled_text, "decoder_lm": _running_text}.get(name, _images)()
    torch.manual_seed(0)
    model = build_model(ModelSpec(name), data).eval()
    batch = data.for_model(model).test
    inputs = in_precision(batch.inputs, torch.float64)
    example = Batch(inputs, batch.targets)
    method = of_copies(model, trace(model, example.inputs), (0.25, 0.5))
    assert method.left_in_operators() == ()
    assert method.difference(example) < 1e-10
