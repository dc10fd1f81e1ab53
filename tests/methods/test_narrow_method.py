"""The methods that differ in their windows: FedAvg by hand bit for bit, slices that fit, bad updates."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from building import AVERAGING, build_method
from simulated import fuse_updates, run_rounds
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, UpdateError
from msfusion.federated.method import Method, Update
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import holding, state_of
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods import HOUSE
from msfusion.methods.narrow import NarrowMethod
from msfusion.objectives import evaluate
from msfusion.scoring import Scoring
from msfusion.width.groups import WidthMap
from msfusion.width.slices import extract
from msfusion.width.trace import trace

SETTINGS = TrainingSettings(learning_rate=0.1, batch_size=4)


class Tied(nn.Module):
    """A language model whose embedding is its output layer, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        result: Tensor = self.head(self.dropout(self.back(self.hidden(x).relu())) + x)
        return result


@cache
def mlp() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, trace(model, (torch.randn(2, 6),))


@cache
def tied() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = Tied()
    return model, trace(model, (torch.randint(11, (2, 5)),))


def images(participants: int = 4) -> list[Batch]:
    return [Batch((torch.randn(n, 6),), torch.randint(3, (n,))) for n in range(5, 5 + participants)]


def texts(participants: int = 4) -> list[Batch]:
    return [
        Batch((torch.randint(11, (n, 5)),), torch.randint(11, (n, 5))) for n in range(5, 5 + participants)
    ]


def method_for(name: str, ratio: float = 0.5, **options: object) -> NarrowMethod:
    method = build_method(name, *mlp(), (ratio,) * 4, SETTINGS, seed=3, **options)  # type: ignore[arg-type]
    assert isinstance(method, NarrowMethod)
    return method


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_methods_of_the_house_are_told_in_this_order_and_all_are_methods() -> None:
    assert HOUSE == (
        "msfusion",
        "fedrolex",
        "heterofl",
        "feddropout",
        "fedavg",
        "windows",
        "small",
        "ensemble",
        "split",
        "fedgrow",
    )
    for name in AVERAGING:
        method = build_method(name, *mlp(), (0.5,) * 4, SETTINGS)
        assert isinstance(method, Method)
        assert method.name == name
        assert not method.recalibrates


def test_a_round_of_fedavg_is_the_loop_by_hand_bit_for_bit() -> None:
    model, data = mlp()[0], images()
    start = state_of(model)
    (result,) = run_rounds(method_for("fedavg"), data, RoundSettings(rounds=1))
    trained = []
    for participant, own in enumerate(data):
        local = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        local.load_state_dict(start)
        local_steps(local, own, SETTINGS, seed=3, round_index=0, participant=participant)
        trained.append(state_of(local))
    total = sum(len(own) for own in data)
    averaged = {
        name: (sum(t[name].double() * len(own) for t, own in zip(trained, data, strict=True)) / total).float()
        for name in start
    }
    for name, tensor in averaged.items():
        torch.testing.assert_close(result.state[name], tensor, rtol=0, atol=0)
    assert same(state_of(model), start)  # the template is untouched


@pytest.mark.one_in_ci
@pytest.mark.parametrize("name", AVERAGING)
def test_one_and_two_workers_and_any_order_give_the_same_bits(name: str) -> None:
    model, width_map = tied()
    ratios = (0.25, 0.5, 1.0, 0.3)
    chosen = RoundSettings(rounds=3, count=3, evaluate_every=3, seed=1)
    data = texts()
    outcomes = []
    for workers in (1, 2):
        method = build_method(
            name,
            model,
            width_map,
            ratios,
            SETTINGS,
            seed=2,
            scoring=Scoring(language_modelling=True),
            rounds=3,
        )
        outcomes.append(list(run_rounds(method, data, chosen, workers=workers, test=data[0])))
    one, two = outcomes
    for left, right in zip(one, two, strict=True):
        assert same(left.state, right.state)
        assert [p.loss for p in left.participants] == [p.loss for p in right.participants]
        assert [p.bytes_up for p in left.participants] == [p.bytes_up for p in right.participants]
    assert one[-1].evaluation == two[-1].evaluation
    assert one[-1].evaluation is not None
    assert one[-1].evaluation.perplexity is not None


def test_the_order_of_updates_does_not_matter() -> None:
    method, data = method_for("msfusion"), images()
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, p), own) for p, own in enumerate(data)]
    assert same(fuse_updates(method, state, updates), fuse_updates(method, state, reversed(updates)))


def test_a_tied_tensor_travels_once_and_stays_tied() -> None:
    model, width_map = tied()
    method = build_method("msfusion", model, width_map, (0.5,) * 4, SETTINGS)
    state = method.initial_state()
    task = method.assign(state, 0, 1)
    update = method.train(task, texts()[1])
    assert set(task.tensors) == set(update.tensors) == set(state) - {"head.weight"}
    fused = fuse_updates(method, state, [update])
    assert torch.equal(fused["head.weight"], fused["embedding.weight"])


def test_a_participant_gets_its_slice_and_nothing_else() -> None:
    method = method_for("msfusion")
    state = method.initial_state()
    for participant in range(4):
        task = method.assign(state, 2, participant)
        window = method.window(2, participant)
        assert same(dict(task.tensors), extract(state, method.width_map, window))
        assert task.tensors["2.weight"].shape == (4, 4)


def test_reused_sub_models_do_not_remember() -> None:
    method, data = method_for("feddropout"), images()
    state = method.initial_state()
    tasks = [method.assign(state, 0, participant) for participant in range(4)]
    first = [method.train(task, own) for task, own in zip(tasks, data, strict=True)]
    again = [method.train(task, own) for task, own in zip(tasks[::-1], data[::-1], strict=True)][::-1]
    fresh = method_for("feddropout").train(tasks[3], data[3])
    assert all(same(dict(a.tensors), dict(b.tensors)) for a, b in zip(first, again, strict=True))
    assert same(dict(fresh.tensors), dict(first[3].tensors))


def test_uniform_weights_count_participants_instead_of_examples() -> None:
    data = images(2)
    for weighting, weights in (("examples", [5.0, 6.0]), ("uniform", [1.0, 1.0])):
        method = method_for("fedavg", weighting=weighting)
        state = method.initial_state()
        updates = [method.train(method.assign(state, 0, p), own) for p, own in enumerate(data)]
        expected = sum(w * u.tensors["0.bias"].double() for w, u in zip(weights, updates, strict=True)) / sum(
            weights
        )
        assert isinstance(expected, Tensor)
        assert torch.equal(fuse_updates(method, state, updates)["0.bias"], expected.float())


def test_settings_may_differ_between_participants() -> None:
    each = [TrainingSettings(max_steps=steps, batch_size=2) for steps in (1, 2)]
    method = build_method("msfusion", *mlp(), (0.5, 1.0), each)
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, p), images()[p]) for p in (0, 1)]
    assert [update.metadata["steps"] for update in updates] == [1, 2]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "2.bias"}, "2.bias"),
        (lambda t: {**t, "extra": torch.zeros(1)}, "extra"),
        (lambda t: {**t, "2.bias": torch.zeros(7)}, "2.bias"),
        (lambda t: {**t, "2.bias": t["2.bias"] * torch.nan}, "not finite"),
    ],
)
def test_a_bad_update_is_refused_by_participant_and_round(change: object, problem: str) -> None:
    method = method_for("msfusion")
    state = method.initial_state()
    good = method.train(method.assign(state, 1, 2), images()[2])
    bad = Update(2, 1, change(dict(good.tensors)), good.examples, good.loss)  # type: ignore[operator]
    with pytest.raises(UpdateError, match=rf"participant 2 in round 2: .*{problem}"):
        fuse_updates(method, state, [bad])


def test_a_missing_tied_tensor_is_refused() -> None:
    model, width_map = tied()
    method = build_method("msfusion", model, width_map, (0.5,) * 4, SETTINGS)
    state = method.initial_state()
    good = method.train(method.assign(state, 0, 0), texts()[0])
    tensors = {name: tensor for name, tensor in good.tensors.items() if name != "embedding.weight"}
    with pytest.raises(UpdateError, match=r"embedding\.weight"):
        fuse_updates(method, state, [Update(0, 0, tensors, 5, 1.0)])


def test_evaluation_is_that_of_a_model_with_this_state_and_leaves_the_template() -> None:
    method = method_for("msfusion")
    before = state_of(method.model)
    state = {name: tensor + 0.1 for name, tensor in before.items()}
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(state)
    data = images()[0]
    assert method.evaluate(state, data) == evaluate(other, data)
    assert same(state_of(method.model), before)


def test_holding_reaches_an_lstm_and_copies_nothing() -> None:
    model, other = nn.LSTM(3, 4), nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    state = state_of(other)
    with holding(model, state), torch.no_grad():
        assert torch.equal(model(x)[0], other(x)[0])
        assert model.weight_ih_l0.data_ptr() == state["weight_ih_l0"].data_ptr()
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fedprox", (0.5,)), 'there is no method "fedprox": choose msfusion, fedrolex'),
        (("msfusion", ()), "there are no participants"),
        (("msfusion", (0.5, 0.0)), "width ratio of participant 1 is 0.0"),
        (("small", (0.5, 1.5)), "width ratio of participant 1 is 1.5"),
        (("msfusion", (float("nan"),)), "width ratio of participant 0 is nan"),
    ],
)
def test_impossible_federations(arguments: tuple[str, tuple[float, ...]], sentence: str) -> None:
    name, ratios = arguments
    with pytest.raises(ConfigError, match=sentence):
        build_method(name, *mlp(), ratios, SETTINGS)
    with pytest.raises(ConfigError, match="there are 2 ratios but 1 training settings"):
        build_method("msfusion", *mlp(), (0.5, 0.5), [SETTINGS])
