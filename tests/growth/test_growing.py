"""`msfusion.grow` as a user calls it: models, folders, configurations, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_families import (
    SHALLOW,
    SMALL,
    WIDE,
    Size,
    bert_masked_lm,
    call,
    decoder,
    gpt2,
    inputs_of,
    perturbed,
    planned,
    tied_llama,
    traced,
    vit,
)
from safetensors.torch import load_file, save_file
from torch import nn

import msfusion
from msfusion.errors import GrowthError, UntraceableModelError
from msfusion.growth import FitSettings, LiGO, fit_operator, plan_growth
from msfusion.growth.pretrained import build_target

pytestmark = pytest.mark.slow

CHANGES = {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": 90}


def saved(folder: Path, **settings: Any) -> nn.Module:
    model = perturbed(gpt2(SHALLOW))
    model.config.use_cache = True
    model.save_pretrained(folder)
    return model


@pytest.mark.release
def test_from_a_folder_and_back(tmp_path: Path) -> None:
    """The grown model computes what the small one does, and loads in transformers as the same type."""
    import transformers

    source = saved(tmp_path / "small")
    grown = msfusion.grow(tmp_path / "small", CHANGES)
    assert not grown.training
    grown.save_pretrained(tmp_path / "large")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    assert loaded.config.model_type == source.config.model_type == "gpt2"
    assert (loaded.config.n_embd, loaded.config.n_layer, loaded.config.use_cache) == (48, 2, True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    torch.testing.assert_close(
        call(loaded.eval(), inputs_of(gpt2)), call(source, inputs_of(gpt2)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "family", [bert_masked_lm, *(pytest.param(each, marks=pytest.mark.release) for each in (vit, tied_llama))]
)
def test_what_has_grown_is_saved_and_loaded(family: Callable[[Size], nn.Module], tmp_path: Path) -> None:
    grown = msfusion.grow(perturbed(family(SHALLOW)), {"hidden_size": 48, "num_attention_heads": 6}).eval()
    grown.save_pretrained(tmp_path / "large")
    loaded = type(grown).from_pretrained(tmp_path / "large").eval()
    assert torch.equal(call(loaded, inputs_of(family)), call(grown, inputs_of(family)))


@pytest.mark.release
def test_heads_of_other_tasks_and_poolers_may_lie_in_a_folder(tmp_path: Path) -> None:
    """As in the published BERT: a masked language model whose file holds the pooler and a second head too."""
    model = perturbed(bert_masked_lm(SHALLOW))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    unused = {name: torch.ones(2) for name in ("bert.pooler.dense.bias", "cls.seq_relationship.bias")}
    save_file(load_file(weights) | unused, weights, {"format": "pt"})
    assert msfusion.grow(tmp_path, {"intermediate_size": 80}).config.intermediate_size == 80


@pytest.mark.release
def test_models_without_a_head_grow_inside_alone() -> None:
    import transformers

    config = bert_masked_lm(SHALLOW).config
    source = transformers.BertModel(config, add_pooling_layer=False)
    assert msfusion.grow(source, {"intermediate_size": 80}).pooler is None
    with pytest.raises(GrowthError, match="give the target 24, or grow a model with a head"):
        msfusion.grow(source, {"hidden_size": 48, "num_attention_heads": 6})


@pytest.mark.release
def test_a_classifier_that_needs_padding() -> None:
    import transformers

    config = transformers.GPT2Config(**gpt2(SHALLOW).config.to_dict())
    with pytest.raises(UntraceableModelError, match="set pad_token_id there"):
        msfusion.grow(transformers.GPT2ForSequenceClassification(config), CHANGES)
    config.pad_token_id = 0
    assert msfusion.grow(transformers.GPT2ForSequenceClassification(config), CHANGES).config.n_embd == 48


def test_a_configuration_as_target() -> None:
    import transformers

    source = gpt2(SHALLOW).double()
    config = transformers.GPT2Config(**(source.config.to_dict() | CHANGES))
    for target in (build_target(source, config), build_target(source, CHANGES)):
        assert type(target) is type(source)
        assert {name: t.shape for name, t in target.state_dict().items()} == {
            name: t.shape for name, t in gpt2(Size(48, 6, 2, 90)).state_dict().items()
        }
        assert target.dtype == torch.float64
    assert source.config.n_embd == 24


@pytest.mark.release
def test_a_setting_with_an_entry_for_each_layer_grows_with_them() -> None:
    """Qwen's layer_types, which its configuration derives. The caller's random numbers stay where they are."""
    import transformers

    sizes = {"vocab_size": 50, "max_position_embeddings": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    config = transformers.Qwen2Config(hidden_size=24, num_attention_heads=3, num_key_value_heads=3, **sizes)
    source = transformers.Qwen2ForCausalLM(config).eval()
    state = torch.get_rng_state()
    grown = msfusion.grow(source, {"num_hidden_layers": 3})
    assert torch.equal(torch.get_rng_state(), state)
    assert len(grown.config.layer_types) == 3
    ids = torch.randint(0, 50, (2, 8))
    torch.testing.assert_close(grown(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.release
def test_a_learned_operator() -> None:
    source, target = traced(decoder, SMALL)[0], decoder(SMALL)
    ids = torch.randint(0, 50, (8, 9))
    data = msfusion.Batch((ids[:, :-1],), ids[:, 1:])
    fit = FitSettings(steps=2)
    grown = msfusion.grow(source, target, "ligo", example_inputs=inputs_of(decoder), data=data, fit=fit)
    operator = LiGO(planned(decoder, SMALL, SMALL))
    fit_operator(operator, source.state_dict(), decoder(SMALL), data, fit)
    expected = operator.materialise(source.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in grown.state_dict().items())
    assert not torch.equal(grown.head.weight, source.head.weight)


@pytest.mark.release
def test_an_own_model_with_an_own_operator() -> None:
    source, target = traced(decoder, SMALL)[0], decoder(WIDE)
    plan, _, _ = plan_growth(source, target, inputs_of(decoder))
    operator = LiGO(plan)
    grown = msfusion.grow(source, target, operator)
    assert grown is target
    expected = operator.materialise(source.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in grown.state_dict().items())
    with pytest.raises(GrowthError, match="made before grows as it is: leave out data and fit"):
        msfusion.grow(source, target, operator, fit=FitSettings(steps=2))
    with pytest.raises(GrowthError, match="does not make this target"):
        msfusion.grow(source, decoder(Size(48, 6, 3, 90)), operator)


@pytest.mark.release
def test_stacking_by_name() -> None:
    source = traced(decoder, SMALL)[0]
    grown = msfusion.grow(source, decoder(Size(24, 3, 4, 40)), "stack", example_inputs=inputs_of(decoder))
    for k, layer in enumerate([0, 1, 0, 1]):
        for name, tensor in grown.decoder.blocks[k].state_dict().items():
            assert torch.equal(tensor, source.decoder.blocks[layer].state_dict()[name])


def test_a_target_of_another_family_or_unknown_settings() -> None:
    import transformers

    source = gpt2(SHALLOW)
    with pytest.raises(GrowthError, match="the source is a gpt2 and the target a bert"):
        msfusion.grow(source, transformers.BertConfig())
    with pytest.raises(GrowthError, match="gpt2 has no setting 'widht'"):
        msfusion.grow(source, {"widht": 48})
    with pytest.raises(GrowthError, match="setting 'n_layer' of a gpt2 cannot be 'x'"):
        msfusion.grow(source, {"n_layer": "x"})
    with pytest.raises(GrowthError, match="cannot be built"):
        msfusion.grow(source, {"n_embd": 50})  # three heads
    with pytest.raises(GrowthError, match="give the target as a model"):
        msfusion.grow(decoder(SMALL), {"features": 48})
    with pytest.raises(GrowthError, match="give grow its example_inputs"):
        msfusion.grow(decoder(SMALL), decoder(WIDE))


def test_operators_that_do_not_exist_or_lack_data() -> None:
    source, target = gpt2(SHALLOW), gpt2(SHALLOW)
    with pytest.raises(GrowthError, match="choose one of preserve, stack, interlace, ligo"):
        msfusion.grow(source, target, "net2net")
    for name, options in (("ligo", {}), ("stack", {"fit": FitSettings()})):
        with pytest.raises(GrowthError, match="on data: give it some"):
            msfusion.grow(source, target, name, **options)  # type: ignore[arg-type]


@pytest.mark.release
def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"no config.json"):
        msfusion.grow(tmp_path / "nowhere", {})
    saved(tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    tensors = load_file(weights)
    lying = tensors | {"transformer.h.0.mlp.c_fc.bias": torch.zeros(41)}
    save_file(lying, weights, {"format": "pt"})
    with pytest.raises(
        GrowthError, match=r"1 tensor is of another shape: '.*c_fc.bias' \(\(41,\) there"
    ) as error:
        msfusion.grow(tmp_path / "small", CHANGES)
    assert "\n" not in str(error.value)
    shallow = {name: tensor for name, tensor in tensors.items() if ".h.0." not in name}
    save_file(shallow, weights, {"format": "pt"})
    with pytest.raises(GrowthError, match=r"12 tensors are missing, such as 'transformer.h.0"):
        msfusion.grow(tmp_path / "small", CHANGES)
    deeper = tensors | {name.replace(".h.0.", ".h.1."): tensor.clone() for name, tensor in tensors.items()}
    save_file(deeper, weights, {"format": "pt"})
    with pytest.raises(GrowthError, match=r"without a place in the model, such as 'transformer.h.1"):
        msfusion.grow(tmp_path / "small", CHANGES)
    weights.write_bytes(b"no tensors at all")
    with pytest.raises(GrowthError, match="cannot be loaded"):
        msfusion.grow(tmp_path / "small", CHANGES)
    weights.unlink()
    with pytest.raises(GrowthError, match=r"no .safetensors weights"):
        msfusion.grow(tmp_path / "small", CHANGES)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"architectures": ["Nonesuch"]}))
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(GrowthError, match="no architecture 'Nonesuch'"):
        msfusion.grow(tmp_path / "small", CHANGES)
