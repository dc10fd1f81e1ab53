"""What a forward decides while it is traced: by chance, by PyTorch's own arithmetic on lengths, about itself."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msfusion.errors import UntraceableModelError
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

INPUTS = (torch.randn(3, 6, 8),)


class Layers(nn.Module):
    """Residual layers; subclasses say which of them run."""

    def __init__(self, skipped: float = 0.0) -> None:
        super().__init__()
        self.skipped = skipped
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def run(self, x: Tensor) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if not self.training or self.run(x):
            x = x + torch.relu(self.middle(x))
        return self.last(x)


class Lycoris(Layers):
    def run(self, x: Tensor) -> bool:
        return bool(torch.rand(1) > self.skipped)


class Survival(Layers):
    def run(self, x: Tensor) -> bool:
        return (
            bool(torch.rand([]).to(x.dtype).lt(1 - self.skipped))
            if self.skipped
            else bool(torch.rand([]).lt(1.0))
        )


class Bernoulli(Layers):
    def run(self, x: Tensor) -> bool:
        return bool(torch.bernoulli(torch.tensor(self.skipped)) == 0)


class Item(Layers):
    def run(self, x: Tensor) -> bool:
        return torch.rand(1).item() >= self.skipped


class ByNumpy(Layers):
    def forward(self, x: Tensor) -> Tensor:
        kept = np.random.choice(x.shape[1], 3, replace=False)
        np.put_along_axis(np.zeros((3, 6)), np.asarray([x.shape[1] - 1 + 0 * kept]), 1, -1)
        return super().forward(x) if int(kept.sum()) != x.sum() else x


@pytest.mark.parametrize("kind", [Lycoris, Survival])
def test_a_chance_of_none_is_no_chance(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    width_map = trace(model, INPUTS)
    assert width_map.reach() > 0.9
    sub, x = narrow(model, width_map, {}), torch.randn(5, 9, 8)
    assert torch.equal(sub.train()(x), model.train()(x))


class InPlace(Layers):
    def run(self, x: Tensor) -> bool:
        return bool(torch.rand(1).mul_(3).sub_(1) > 0.0)


class ByItsView(Layers):
    def run(self, x: Tensor) -> bool:
        number = torch.rand(1)
        number.view(1, 1).sub_(0.5)
        return bool(number > 0.0)


class Negated(Layers):
    def run(self, x: Tensor) -> bool:
        return bool((torch.rand(1) > 0.0).logical_and_(torch.rand(1) > 0.5))


class Coarse(Layers):
    def run(self, x: Tensor) -> bool:
        return bool(torch.rand(1, dtype=torch.bfloat16) > 0.0)  # which is 0 once in 256 draws


@pytest.mark.one_in_ci
@pytest.mark.parametrize("kind", [Lycoris, Survival, Bernoulli, Item, InPlace, ByItsView, Negated, Coarse])
def test_what_chance_decides_is_refused_with_what_to_do(kind: Any) -> None:
    with pytest.raises(UntraceableModelError, match="DropPath"):
        trace(kind(0.5), INPUTS)


def test_a_decision_on_a_value_is_not_called_chance() -> None:
    class Branch(Layers):
        def run(self, x: Tensor) -> bool:
            return bool(x.sum() > 0)

    with pytest.raises(UntraceableModelError, match="operation") as caught:
        trace(Branch(), INPUTS)
    assert "DropPath" not in str(caught.value)


def test_numpy_is_named_where_an_export_fails_after_its_draw() -> None:
    with pytest.raises(UntraceableModelError, match="numpy"):
        trace(ByNumpy(), INPUTS)


class Half(Layers):
    """How many steps there are is worked out by PyTorch, which export does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        steps = int(torch.div(x.shape[1], 2, rounding_mode="floor"))
        return sum((super(Half, self).forward(x[:, i]) for i in range(steps)), torch.zeros(1))


def test_a_number_that_pytorch_makes_of_a_length_fixes_it() -> None:
    model = Half().eval()
    sub = narrow(model, trace(model, INPUTS), {}).eval()
    torch.testing.assert_close(sub(torch.ones(5, 6, 8)), model(torch.ones(5, 6, 8)))
    with pytest.raises(TypeError, match="axis 1"):
        sub(torch.ones(5, 8, 8))


class Converts(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.middle = self.middle.to(torch.float32).float()
        return self.last(torch.relu(self.middle(self.first(x).float())).to(self.last.weight.dtype))


def test_a_module_may_convert_itself_to_what_it_is() -> None:
    model = Converts()
    middle = model.middle
    assert trace(model, INPUTS).reach() > 0.9
    assert model.middle is middle
    sub = narrow(model, trace(model, INPUTS), {})
    assert torch.equal(sub(*INPUTS), model(*INPUTS))


def test_a_module_that_is_converted_says_what_to_do() -> None:
    model = Converts().bfloat16()
    inputs = (INPUTS[0].bfloat16(),)
    with pytest.raises(UntraceableModelError, match="call the model once"):
        trace(model, inputs)
    model(*inputs)
    assert trace(model, inputs).reach() > 0.9


def test_packed_sequences_are_refused_with_what_to_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 16, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]

    with pytest.raises(UntraceableModelError, match="padded sequence"):
        trace(Packed(), (INPUTS[0], torch.tensor([6, 5, 3])))


@pytest.mark.release
def test_a_cache_that_was_given_is_no_output() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers import DynamicCache

    class Prefix(nn.Module):
        """Prefix tuning: learned keys and values come first."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
            config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes)
            self.model = transformers.LlamaForCausalLM(config)
            self.prefix = nn.Parameter(torch.randn(2, 2, 3, 8))

        def forward(self, tokens: Tensor) -> Any:
            key, value = (part.expand(len(tokens), -1, -1, -1) for part in self.prefix)
            cache = DynamicCache()
            cache.update(key, value, 0)
            return self.model(tokens, None, None, cache, use_cache=True)

    model, tokens = Prefix().eval(), torch.randint(30, (2, 6))
    sub = narrow(model, trace(model, (tokens,)), {}).eval()
    answer = sub(tokens)
    assert isinstance(answer, collections.OrderedDict)
    assert list(answer) == ["logits"]
    assert torch.equal(answer.logits, model(tokens).logits)
