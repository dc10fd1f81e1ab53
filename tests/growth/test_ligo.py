"""The LiGO operator against what the paper writes, and what its tensors are."""

from __future__ import annotations

import itertools

import pytest
import torch
from growth_families import (
    GROUPED,
    LARGE,
    ODD,
    SHALLOW,
    SMALL,
    WIDE,
    Size,
    bert_classifier,
    decoder,
    gpt2,
    llama,
    planned,
    traced,
    vit,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

import msfusion
from msfusion.errors import GrowthError
from msfusion.growth import GrownModel, LiGO, Space, Start, preserving
from msfusion.growth.starts import copied_from, depth_start, kept_rows, width_start
from msfusion.objectives import cross_entropy


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("family", "size"),
    [(bert_classifier, SMALL), (gpt2, SHALLOW), (vit, SHALLOW), (llama, GROUPED), (decoder, SMALL)],
)
@pytest.mark.parametrize("form", ["full", "padded"])
def test_equal_sizes_give_the_identity(family, size: Size, form: str) -> None:
    state = traced(family, size)[0].state_dict()
    grown = LiGO(planned(family, size, size), form=form).materialise(state)
    assert list(grown) == list(state)
    assert all(torch.equal(grown[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("depth", "layers"), [("stack", [0, 1, 0, 1]), ("interlace", [0, 0, 1, 1])])
def test_one_hot_depth_is_stacking_or_interlacing_exactly(depth: str, layers: list[int]) -> None:
    deep = Size(24, 3, 4, 40)
    state = traced(decoder, SMALL)[0].state_dict()
    grown = LiGO(planned(decoder, SMALL, deep), Start(depth=depth)).materialise(state)
    for name, tensor in grown.items():
        if name.startswith("decoder.blocks."):
            number, _, rest = name.removeprefix("decoder.blocks.").partition(".")
            name = f"decoder.blocks.{layers[int(number)]}.{rest}"
        assert torch.equal(tensor, state[name])


@pytest.mark.release
@pytest.mark.parametrize(("depth", "layers"), [("stack", [0, 1, 0, 1]), ("interlace", [0, 0, 1, 1])])
def test_one_hot_depth_copies_the_layers_that_were_widened(depth: str, layers: list[int]) -> None:
    """Also where the width grows, and for BERT: width first, then whole layers, all of one layer's tensors together."""
    state = traced(bert_classifier, SMALL)[0].state_dict()
    operator = LiGO(planned(bert_classifier, SMALL, LARGE), Start(depth=depth))
    widths = {name: tensor for name, tensor in operator.tensors().items() if name.startswith("width.")}
    wide = LiGO(planned(bert_classifier, SMALL, WIDE))
    wide.load_tensors(wide.tensors() | widths)
    expected = wide.materialise(state)
    for name, tensor in operator.materialise(state).items():
        if name.startswith("bert.encoder.layer."):
            number, _, rest = name.removeprefix("bert.encoder.layer.").partition(".")
            name = f"bert.encoder.layer.{layers[int(number)]}.{rest}"
        assert torch.equal(tensor, expected[name])


@pytest.mark.release
def test_a_bert_layer_as_the_paper_writes_it() -> None:
    """W' = B_out W B_in^T for each matrix of a layer, by hand, then the layers mixed by each module's own weights."""
    state = {name: tensor.double() for name, tensor in traced(bert_classifier, SMALL)[0].state_dict().items()}
    operator = LiGO(planned(bert_classifier, SMALL, LARGE), Start("random", "random"), seed=3).double()
    t = operator.tensors()
    grown = operator.materialise(state)
    e = t["width.bert.embeddings.word_embeddings.B"]
    wide: dict[str, list[Tensor]] = {}
    for layer in (0, 1):
        block = f"bert.encoder.layer.{layer}."
        w = {name.removeprefix(block): tensor for name, tensor in state.items() if name.startswith(block)}
        q, k, v = (t[f"width.{block}attention.self.{name}.B"] for name in ("query", "key", "value"))
        f = t[f"width.{block}intermediate.dense.B"]
        by_hand = {
            "attention.self.query.weight": q @ w["attention.self.query.weight"] @ e.T,
            "attention.self.query.bias": q @ w["attention.self.query.bias"],
            "attention.self.key.weight": k @ w["attention.self.key.weight"] @ e.T,
            "attention.self.key.bias": k @ w["attention.self.key.bias"],
            "attention.self.value.weight": v @ w["attention.self.value.weight"] @ e.T,
            "attention.self.value.bias": v @ w["attention.self.value.bias"],
            "attention.output.dense.weight": e @ w["attention.output.dense.weight"] @ v.T,
            "attention.output.dense.bias": e @ w["attention.output.dense.bias"],
            "attention.output.LayerNorm.weight": e @ w["attention.output.LayerNorm.weight"],
            "attention.output.LayerNorm.bias": e @ w["attention.output.LayerNorm.bias"],
            "intermediate.dense.weight": f @ w["intermediate.dense.weight"] @ e.T,
            "intermediate.dense.bias": f @ w["intermediate.dense.bias"],
            "output.dense.weight": e @ w["output.dense.weight"] @ f.T,
            "output.dense.bias": e @ w["output.dense.bias"],
            "output.LayerNorm.weight": e @ w["output.LayerNorm.weight"],
            "output.LayerNorm.bias": e @ w["output.LayerNorm.bias"],
        }
        assert set(by_hand) == set(w)
        for name, tensor in by_hand.items():
            wide.setdefault(name, []).append(tensor)
    for name, k in itertools.product(wide, range(4)):
        mixing = t[f"depth.bert.encoder.layer.{name.rpartition('.')[0]}.w"]
        expected = mixing[k, 0] * wide[name][0] + mixing[k, 1] * wide[name][1]
        torch.testing.assert_close(grown[f"bert.encoder.layer.{k}.{name}"], expected)
    words = state["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(grown["bert.embeddings.word_embeddings.weight"], words @ e.T)
    pooler = t["width.bert.pooler.dense.B"]
    torch.testing.assert_close(
        grown["bert.pooler.dense.weight"], pooler @ state["bert.pooler.dense.weight"] @ e.T
    )
    torch.testing.assert_close(grown["classifier.weight"], state["classifier.weight"] @ pooler.T)
    assert torch.equal(grown["classifier.bias"], state["classifier.bias"])


def batch() -> msfusion.Batch:
    ids = torch.randint(0, 50, (8, 9), generator=torch.Generator().manual_seed(4))
    return msfusion.Batch((ids[:, :-1],), ids[:, 1:])


@pytest.mark.parametrize("form", ["full", "padded"])
def test_gradients_reach_the_operator_only(form: str) -> None:
    source, target = traced(decoder, SMALL)[0], traced(decoder, LARGE)[0]
    operator = LiGO(planned(decoder, SMALL, LARGE), form=form)
    model = GrownModel(operator, source.state_dict(keep_vars=True), target)
    cross_entropy(model, batch()).backward()
    assert {id(p) for p in model.parameters()} == {id(p) for p in operator.parameters()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in operator.parameters())
    assert all(p.grad is None for m in (source, target) for p in m.parameters())


def test_training_through_is_the_materialised_model() -> None:
    source, target = traced(decoder, SMALL)[0], traced(decoder, ODD)[0]
    operator = LiGO(planned(decoder, SMALL, ODD), Start("average", "interlace_noisy"))
    tensors = operator.materialise(source.state_dict())
    assert tensors["head.weight"] is tensors["decoder.tokens.weight"]  # tied, once
    ids = batch().inputs[0]
    torch.testing.assert_close(
        GrownModel(operator, source.state_dict(), target).eval()(ids),
        functional_call(target, tensors, (ids,)),
    )


@pytest.mark.release
def test_two_operators_one_after_the_other_are_dual_ligo() -> None:
    """The shared operator is the same for all participants, whatever they own; its tensors say nothing of that."""
    intermediate, target = Size(32, 4, 2, 48), LARGE
    shared = LiGO(planned(decoder, intermediate, target), seed=1)
    logits = []
    for size in (SMALL, SHALLOW):
        private = LiGO(planned(decoder, size, intermediate), Start("random", "uniform"), seed=2)
        model = traced(decoder, size)[0]
        state = private.materialise(model.state_dict())
        assert {n: t.shape for n, t in state.items()} == {
            n: t.shape for n, t in traced(decoder, intermediate)[0].state_dict().items()
        }
        other = LiGO(planned(decoder, intermediate, target), Start("random", "random"), seed=5)
        other.load_tensors(shared.tensors())
        grown = other.materialise(state)
        logits.append(functional_call(traced(decoder, target)[0], grown, (batch().inputs[0],)))
        composed = shared.tensors()["width.decoder.tokens.B"] @ private.tensors()["width.decoder.tokens.B"]
        torch.testing.assert_close(
            grown["decoder.tokens.weight"],
            model.state_dict()["decoder.tokens.weight"] @ composed.T,
            rtol=1e-4,
            atol=1e-5,
        )
    assert not torch.equal(*logits)


def test_tensors_are_plain_and_taken_over_exactly() -> None:
    plan = planned(decoder, SMALL, LARGE)
    first, second = LiGO(plan, Start("random", "random"), seed=1), LiGO(plan, seed=2)
    assert set(first.tensors()) == {f"width.{name}.B" for name in plan.spaces} | {
        f"depth.{k}.w" for k in plan.layers
    }
    assert first.tensors().keys() == first.state_dict().keys()
    second.load_tensors(first.tensors())
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in second.tensors().items())
    again = LiGO(plan, Start("random", "random"), seed=1)
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in again.tensors().items())
    tensors = first.tensors()
    name, tensor = next(iter(tensors.items()))
    with pytest.raises(GrowthError, match=r"'extra'.* in one of them only"):
        second.load_tensors(tensors | {"extra": tensor})
    with pytest.raises(GrowthError, match="has shape"):
        second.load_tensors(tensors | {name: tensor[:-1]})


def test_two_matrices_a_space_start_as_net2net() -> None:
    """What is written by copies is read with their number divided out."""
    plan = planned(decoder, SMALL, LARGE)
    operator = LiGO(plan, Start(noise=0.0), tied=False)
    for name, space in plan.spaces.items():
        written, read = operator.tensors()[f"width.{name}.B"], operator.tensors()[f"width.{name}.A"]
        torch.testing.assert_close(read.T @ written, torch.eye(space.source))


def test_an_operator_that_starts_from_copies() -> None:
    """It begins where the copies are, to float32's rounding, and every tensor of it can move."""
    source, source_map = traced(decoder, SMALL)
    target, target_map = traced(decoder, LARGE)
    plan = planned(decoder, SMALL, LARGE)
    copies = preserving(plan, source_map, target_map, source.state_dict())
    operator = LiGO(plan, copies)
    expected = copies.materialise(source.state_dict())
    for name, tensor in operator.materialise(source.state_dict()).items():
        torch.testing.assert_close(tensor, expected[name])
    assert {"contract", "produce", "scale", "shift"} == {
        name.rpartition(".")[2] for name in operator.tensors() if name.startswith("width.decoder.tokens.")
    }
    cross_entropy(GrownModel(operator, source.state_dict(), target), batch()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in operator.parameters())
    with pytest.raises(GrowthError, match="must be full"):
        LiGO(plan, copies, form="padded")


def test_odd_choices_are_refused() -> None:
    plan = planned(decoder, SMALL, LARGE)
    start = object.__new__(Start)  # straight to the check: in tests the types of fields are checked as well
    object.__setattr__(start, "width", "xavier")
    with pytest.raises(GrowthError, match='width is "xavier": it must be one of copy, average, random'):
        start.__post_init__()
    with pytest.raises(GrowthError, match=r"noise is -1\.0: it must be at least 0"):
        Start(noise=-1.0)
    with pytest.raises(GrowthError, match="keeps the old units"):
        LiGO(plan, Start("random"), form="padded")


sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=3)


@given(sizes)
def test_copies_in_turn(pairs: list[tuple[int, int]]) -> None:
    source, target = tuple(n for n, _ in pairs), tuple(n + more for n, more in pairs)
    space = Space("x", source, target)
    origin = copied_from(space)
    expected = [
        sum(
            (index % n) * _stride(source, f) for f, (index, n) in enumerate(zip(indices, source, strict=True))
        )
        for indices in itertools.product(*map(range, target))
    ]
    assert origin.tolist() == expected
    assert origin[kept_rows(space)].tolist() == list(range(space.source))
    matrix = width_start(space, Start("average"), torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix.sum(1), torch.ones(space.target))
    assert torch.equal(matrix[kept_rows(space)], torch.eye(space.source))


def _stride(sizes: tuple[int, ...], factor: int) -> int:
    stride = 1
    for size in sizes[factor + 1 :]:
        stride *= size
    return stride


@given(st.integers(1, 5), st.integers(0, 7), st.sampled_from(["stack", "interlace"]))
def test_depth_starts(source: int, more: int, order: str) -> None:
    target = source + more
    generator = torch.Generator().manual_seed(0)
    plain = depth_start(source, target, order, generator)  # type: ignore[arg-type]
    assert torch.equal(plain.sum(1), torch.ones(target))
    chosen = plain.argmax(1).tolist()
    if order == "stack":
        assert chosen == [k % source for k in range(target)]
    else:
        assert chosen == sorted(chosen)
        assert set(chosen) == set(range(source))
    noisy = depth_start(source, target, f"{order}_noisy", generator)  # type: ignore[arg-type]
    torch.testing.assert_close(noisy.sum(1), torch.ones(target))
    assert noisy.argmax(1).tolist() == chosen
    uniform = depth_start(source, target, "uniform", generator)
    torch.testing.assert_close(uniform, torch.full((target, source), 1 / source))
