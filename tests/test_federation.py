"""A federation in a program: what it gives, how it goes on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federations import TRAINING, Falling, examples, federation, network, same
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import msfusion
from msfusion.batch import Batch
from msfusion.data.datasets import batch_of
from msfusion.errors import ConfigError, DataError, RunDirectoryError, TrainingError
from msfusion.methods.parts.contrastive import ContrastiveSettings


def test_rounds_lead_to_a_model_that_is_better() -> None:
    before = network()
    ours = federation(method=msfusion.FedAvg())
    history = ours.fit(20)
    assert [result.number for result in history] == list(range(1, 21))
    trained, (inputs, targets) = ours.model(), examples(200, 5)
    shares = [float((model(inputs).argmax(1) == targets).double().mean()) for model in (before, trained)]
    assert shares[1] > shares[0] + 0.2
    found = ours.evaluate((inputs, targets))
    assert found.accuracy == pytest.approx(shares[1])
    assert ours.evaluate() == history[-1].evaluation


def test_the_users_model_is_left_alone() -> None:
    model = network()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    msfusion.Federation(model, [examples(20)], method=msfusion.FedAvg(), training=TRAINING).fit(2)
    assert same(dict(model.state_dict()), kept)


def test_it_is_the_command_lines_run(tmp_path: Path) -> None:
    """The same data, model and settings as a configuration: the same bits."""
    from msfusion.experiment.config import load_config
    from msfusion.experiment.setup import prepare
    from msfusion.federated.rounds import run_rounds

    settings = [
        "rounds=2", "data.max_train=120", "participants.count=3", "model.name=convnet", "method.start=fresh",
        "training.optimizer=adamw", "training.learning_rate=0.01", "training.batch_size=8", "training.local_epochs=1",
        "training.learning_rate_schedule=constant",
    ]  # fmt: skip
    made = prepare(load_config(None, settings))
    *_, last = run_rounds(made.method, made.data.participants, made.rounds)
    ours = msfusion.Federation(
        made.model, made.data, method=msfusion.MSfusion(ratio=0.25, start="fresh"), training=TRAINING
    )
    ours.fit(2)
    assert same(ours.state, last.state)


@pytest.mark.parametrize(
    "method",
    [
        msfusion.MSfusion(ratio=0.5, start="fresh", contrastive=ContrastiveSettings(0.5)),
        msfusion.MSfusion(ratio=0.5, start="blocks", blocks=2),
        msfusion.Small(ratio=0.5),
    ],
    ids=lambda each: f"{each.name} {getattr(each, 'start', '')}",
)
def test_saved_and_resumed_it_ends_with_the_same_bits(method: Any, tmp_path: Path) -> None:
    whole = federation(method=method)
    whole.fit(4)
    half = federation(method=method)
    for result in half.rounds(4):
        if result.number == 2:
            half.save(tmp_path)
            break
    assert half.done == 2
    rest = federation(method=method).resume(tmp_path)
    assert (rest.done, rest.planned) == (2, 4)
    assert [result.number for result in rest.rounds(2)] == [3, 4]
    assert same(rest.state, whole.state)


def test_what_was_saved_by_another_is_refused(tmp_path: Path) -> None:
    ours = federation()
    ours.fit(1)
    ours.save(tmp_path)
    with pytest.raises(ConfigError, match="was saved by msfusion with seed 0"):
        federation(method=msfusion.FedAvg()).resume(tmp_path)
    with pytest.raises(ConfigError, match="with seed 0, and this is msfusion with seed 1"):
        federation(seed=1).resume(tmp_path)
    damaged = tmp_path / "federation.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(RunDirectoryError):
        federation().resume(tmp_path)
    with pytest.raises(RunDirectoryError):
        federation().resume(tmp_path / "nothing")


def test_rounds_can_be_added_where_the_method_does_not_plan_ahead() -> None:
    ours = federation()
    ours.fit(2)
    ours.fit(1)
    assert ours.done == 3
    assert len(ours.history) == 3
    blocks = federation(method=msfusion.MSfusion(ratio=0.5))
    blocks.fit(2)
    assert set(blocks.state) > {"block0.0.weight"}
    with pytest.raises(ConfigError, match="give all rounds at once"):
        blocks.fit(500)


def test_own_loss_and_metrics() -> None:
    inputs, _ = examples(60)
    targets = inputs[:, :2] * 3
    ours = msfusion.Federation(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)),
        [(inputs[each::3], targets[each::3]) for each in range(3)],
        method=msfusion.MSfusion(ratio=0.5, start="fresh"),
        training=TRAINING,
        test=(inputs, targets),
        loss=nn.functional.l1_loss,
        metrics={"largest": lambda outputs, wanted: (outputs - wanted).abs().max()},
    )
    first, *_, last = ours.fit(20)
    assert first.evaluation is not None
    assert last.evaluation is not None
    assert last.evaluation.accuracy is None
    assert last.evaluation.loss < 0.7 * first.evaluation.loss
    outputs = ours.model()(inputs).detach()
    assert last.evaluation.loss == pytest.approx(float((outputs - targets).abs().mean()), rel=1e-5)
    assert last.figures()["largest"] == pytest.approx(float((outputs - targets).abs().max()), rel=1e-5)


def test_several_processes_end_with_the_same_bits() -> None:
    alone, several = federation(), federation(engine=msfusion.Processes(2))
    alone.fit(2)
    several.fit(2)
    assert same(alone.state, several.state)


class Pairs(Dataset[Any]):
    def __init__(self, form: str) -> None:
        self.form, (self.inputs, self.targets) = form, examples(12)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError
        if self.form == "dict":
            return {"input": self.inputs[index], "labels": int(self.targets[index])}
        return self.inputs[index], int(self.targets[index])


def test_datasets_of_all_kinds_are_the_same_examples() -> None:
    inputs, targets = examples(12)
    for given in (
        TensorDataset(inputs, targets),
        Pairs("tuple"),
        (inputs, targets),
        Batch((inputs,), targets),
    ):
        found = batch_of(given)
        assert isinstance(found.inputs, tuple)
        assert torch.equal(found.inputs[0], inputs)
        assert torch.equal(found.targets, targets)
    found = batch_of(Pairs("dict"))
    assert isinstance(found.inputs, dict)
    assert torch.equal(found.inputs["input"], inputs)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (iter([1]), "holds no examples that can be counted"),
        ((torch.zeros(3, 2), torch.zeros(4)), "differ in how many examples"),
        (torch.zeros(3), "an example is a Tensor"),
        ([], "there are no examples"),
        ([{"x": torch.zeros(2)}], "one of them must be called"),
        ([(torch.zeros(2), 1), (torch.zeros(3), 1)], "cannot be stacked"),
    ],
)
def test_what_is_no_data_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        batch_of(given)


@pytest.mark.without_type_checks
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "no such"}, 'there is no method "no such"'),
        ({"method": 3}, "method is a int"),
        ({"method": "split"}, r"SplitSettings\(at="),
        ({"method": "fedgrow"}, "grow_method"),
        ({"training": [TRAINING]}, "3 participants and 1 training settings"),
        ({"loss": 3}, "the loss is a int"),
        ({"metrics": {"loss": abs}}, "as one of ours"),
        ({"metrics": {"m": 3}}, "the metric 'm' is a int"),
        ({"fraction": 0.0}, "fraction is"),
        ({"method": msfusion.MSfusion(ratio=(0.5, 0.5))}, "2 width ratios and 3 participants"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        federation(**options).fit(1)


def test_a_name_stands_for_a_method_as_it_is_by_default() -> None:
    assert federation(method="fedavg").settings == msfusion.FedAvg()


@pytest.mark.without_type_checks
def test_labels_that_the_model_does_not_know_are_told() -> None:
    inputs, targets = examples(20)
    with pytest.raises(DataError, match="participant 0"):
        msfusion.Federation(network(), [(inputs, targets + 5)])
    with pytest.raises(DataError, match="give a loss"):
        msfusion.Federation(network(), [(inputs, inputs)])
    with pytest.raises(DataError, match="no participants"):
        msfusion.Federation(network(), [])


def test_the_public_page_is_whole() -> None:
    for name in msfusion.__all__:
        assert getattr(msfusion, name) is not None
    assert len(set(msfusion.__all__)) == len(msfusion.__all__)


def states_of(training: msfusion.Training) -> dict[str, Tensor]:
    ours = federation(training=training, method=msfusion.FedAvg())
    ours.fit(2)
    return ours.state


def test_an_optimiser_and_a_schedule_of_ones_own() -> None:
    usual = {"learning_rate": 0.05, "momentum": 0.9, "batch_size": 8}
    theirs = states_of(msfusion.Training("sgd", **usual))  # type: ignore[arg-type]

    def make(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, rate, momentum=0.9, fused=True)

    ours = states_of(msfusion.Training("sgd", **usual, make_optimizer=make))  # type: ignore[arg-type]
    assert same(ours, theirs)
    seen: list[tuple[int, int]] = []

    def half(round_index: int, rounds: int) -> float:
        seen.append((round_index, rounds))
        return 0.5

    halved = states_of(msfusion.Training("sgd", **{**usual, "learning_rate": 0.1}, schedule=half))  # type: ignore[arg-type]
    assert same(halved, theirs)
    assert set(seen) == {(0, 2), (1, 2)}
    with pytest.raises(ConfigError, match=r"must be a torch\.optim\.Optimizer"):
        states_of(msfusion.Training(make_optimizer=lambda parameters, rate: None))  # type: ignore[arg-type,return-value]


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32() -> None:
    plain, mixed = (
        states_of(msfusion.Training("sgd", 0.05, batch_size=8, precision=precision))  # type: ignore[arg-type]
        for precision in ("float32", "bfloat16")
    )
    assert all(tensor.dtype == torch.float32 for tensor in mixed.values())
    assert not same(plain, mixed)
    for name, tensor in plain.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=0, atol=0.02)
    with pytest.raises(ConfigError, match="set together to 1"):
        federation(training=msfusion.Training(precision="bfloat16"), together=2).fit(1)


def test_one_engine_serves_one_run_at_a_time() -> None:
    engine = msfusion.Processes(2)
    first, second = federation(engine=engine), federation(engine=engine, seed=1)
    rounds = first.rounds(2)
    next(rounds)
    with pytest.raises(ConfigError, match="an engine of its own"):
        second.fit(1)
    next(rounds)
    rounds.close()
    second.fit(1)
    alone = federation(seed=1)
    alone.fit(1)
    assert same(second.state, alone.state)


class Controlled(msfusion.Method):
    """Sends a tensor of its own down, and averages what comes back of it."""

    name = "controlled"

    def initial_state(self) -> dict[str, Tensor]:
        return {**super().initial_state(), ".control": torch.zeros(2)}

    def assign(self, state: Any, round_index: int, participant: int) -> msfusion.Task:
        return msfusion.Task(participant, round_index, dict(state))

    def train(self, task: msfusion.Task, data: Batch) -> msfusion.Update:
        weights = msfusion.model_state(task.tensors)
        update = self.trained(self.working(weights), task, data)
        mine = task.tensors[".control"] + task.participant
        return msfusion.Update(
            update.participant,
            update.round_index,
            {**update.tensors, ".control": mine},
            update.examples,
            update.loss,
        )

    def fuse(self, state: Any, answered: msfusion.Answered) -> dict[str, Tensor]:
        return self.averaged(state, answered)


def test_tensors_of_the_methods_own_are_averaged_where_they_come_back() -> None:
    ours = federation(method=Controlled())
    ours.fit(2)
    assert ours.state[".control"].tolist() == [2.0, 2.0]  # the mean of 0, 1, 2, twice
    assert repr(ours.method) == "<Controlled 'controlled'>"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"training": msfusion.Training("adamw", learning_rate=0.02, batch_size=8)}, "training settings"),
        ({"method": msfusion.MSfusion(ratio=0.25, start="fresh")}, "settings of the method"),
        ({"fraction": 0.5}, "settings of the rounds"),
        ({"metrics": {"m": lambda o, t: 1.0}}, "losses or metrics"),
    ],
)
def test_what_was_saved_with_other_settings_is_refused(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    ours = federation()
    ours.fit(1)
    ours.save(tmp_path)
    with pytest.raises(ConfigError, match=f"with other {what}"):
        federation(**options).resume(tmp_path)
    others = msfusion.Federation(
        network(), [examples(20, seed) for seed in (5, 6, 7)], method=msfusion.MSfusion(ratio=0.5, start="fresh"),
        training=TRAINING, test=examples(40, 9),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="other examples"):
        others.resume(tmp_path)


def test_rounds_are_run_once_at_a_time() -> None:
    ours = federation()
    rounds = ours.rounds(3)
    next(rounds)
    with pytest.raises(ConfigError, match="being run already"):
        ours.fit(1)
    rounds.close()
    ours.fit(1)
    assert [line["round"] for line in ours.figures] == [1, 2]


def test_the_names_of_the_house_are_not_taken() -> None:
    for take, name in (
        (msfusion.method, "fedavg"),
        (msfusion.loss, "mse"),
        (msfusion.loss, "cross_entropy"),
        (msfusion.metric, "auc"),
        (msfusion.average, "mean"),
        (msfusion.average, "trimmed"),
        (msfusion.schedule, "static"),
    ):
        with pytest.raises(ConfigError, match=name):
            take(name)(
                type("FedAvg", (msfusion.Method,), {}) if take is msfusion.method else lambda *given: None
            )  # type: ignore[operator]


class Spoiling(msfusion.Method):
    name = "spoiling"

    def assign(self, state: Any, round_index: int, participant: int) -> msfusion.Task:
        return msfusion.Task(participant, round_index, dict(state))

    def train(self, task: msfusion.Task, data: Batch) -> msfusion.Update:
        return self.trained(self.working(task.tensors), task, data)

    def fuse(self, state: Any, answered: msfusion.Answered) -> dict[str, Tensor]:
        return {name: tensor * float("nan") for name, tensor in self.averaged(state, answered).items()}


class Silent(msfusion.InProcess):
    def run(self, method: Any, asks: Any) -> Any:
        yield from list(super().run(method, asks))[1:]


class Doubling(msfusion.InProcess):
    def run(self, method: Any, asks: Any) -> Any:
        for answer in super().run(method, asks):
            yield answer
            yield answer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": Spoiling()}, "spoiling: fuse made .0.weight. not finite"),
        ({"engine": Silent()}, "no answer for participant"),
        ({"engine": Doubling()}, "answered twice"),
    ],
)
def test_what_goes_wrong_in_parts_of_others_is_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        federation(**options).fit(1)


def all_of_it(width_map: Any, who: int, round_index: int, ratio: float, **_: Any) -> dict[str, Tensor]:
    return dict(width_map.full_window())


def nothing(width_map: Any, who: int, round_index: int, ratio: float, **_: Any) -> dict[str, Tensor]:
    return {}


def by_chance(width_map: Any, who: int, round_index: int, ratio: float, **_: Any) -> dict[str, Tensor]:
    size = {group.name: msfusion.windows.window_size(ratio, group.units) for group in width_map.groups}
    return {group.name: torch.randperm(group.units)[: size[group.name]] for group in width_map.groups}


def leaving(*given: Any, **more: Any) -> dict[str, Tensor]:
    raise SystemExit


def mistaken(*given: Any, **more: Any) -> dict[str, Tensor]:
    raise KeyError("a mistake")


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (all_of_it, "gives 16 of 16 units"),
        (nothing, "give a dict with a tensor"),
        (by_chance, "another window when it is asked again"),
        (mistaken, "mistaken failed with KeyError"),
        (leaving, "leaving .* raised SystemExit, which would end the program"),
    ],
)
def test_a_schedule_that_gives_no_windows_is_refused(schedule: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        federation(method=msfusion.Windows(ratio=0.5, schedule=schedule)).fit(1)


@pytest.mark.without_type_checks
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": "x"}, "give a msfusion.Engine"),
        ({"callbacks": [print]}, "give a list of msfusion.Callback"),
        ({"metrics": [print]}, "give a dict of metrics"),
        ({"seed": -1}, "an int of at least 0"),
        ({"evaluation_batch_size": 0}, "at least 1"),
        ({"metrics": {"m": Falling}}, "not its class"),
    ],
)
def test_arguments_of_other_types_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        federation(**options)


def test_labels_of_any_whole_type_are_labels() -> None:
    inputs, targets = examples(20)
    states = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        ours = msfusion.Federation(
            network(), [(inputs, targets.to(kind))], method=msfusion.FedAvg(), training=TRAINING
        )
        ours.fit(1)
        states.append(ours.state)
    assert all(same(state, states[0]) for state in states)
    with pytest.raises(DataError, match="differ in how many"):
        msfusion.Federation(network(), [Batch((inputs,), targets[:5])])
    with pytest.raises(DataError, match="cannot be called on participant 0"):
        msfusion.Federation(network(), [(inputs[:, :3], targets)])


def test_one_output_for_two_labels_has_no_accuracy_and_trains() -> None:
    inputs, targets = examples(30)
    ours = msfusion.Federation(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), [(inputs, (targets > 0).long())],
        method=msfusion.FedAvg(), training=TRAINING, test=(inputs, (targets > 0).long()),
        loss=lambda o, t: nn.functional.binary_cross_entropy_with_logits(o[:, 0], t.float()),
    )  # fmt: skip
    first, *_, last = ours.fit(8)
    assert last.evaluation is not None
    assert first.evaluation is not None
    assert last.evaluation.accuracy is None
    assert last.evaluation.loss < first.evaluation.loss
