"""A federation in a program: what it gives, how it goes on, what it refuses, and who is told."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import msfusion
from msfusion.batch import Batch
from msfusion.data.datasets import batch_of
from msfusion.errors import ConfigError, DataError, RunDirectoryError, TrainingError
from msfusion.federated.results import RoundResult
from msfusion.methods.parts.contrastive import ContrastiveSettings

TRAINING = msfusion.Training("adamw", learning_rate=0.01, batch_size=8)


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def federation(**options: Any) -> msfusion.Federation:
    given = {
        "method": msfusion.MSfusion(ratio=0.5, start="fresh"),
        "training": TRAINING,
        "test": examples(40, 9),
    }
    return msfusion.Federation(network(), [examples(20, seed) for seed in range(3)], **{**given, **options})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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


class Noting(msfusion.Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self, federation: msfusion.Federation) -> None:
        self.seen.append("begin")

    def participant(self, federation: msfusion.Federation, result: Any) -> None:
        self.seen.append(f"participant {result.participant}")

    def round(self, federation: msfusion.Federation, result: RoundResult) -> bool:
        assert federation.done == result.number
        self.seen.append(f"round {result.number}")
        return result.number == 2

    def end(self, federation: msfusion.Federation) -> None:
        self.seen.append("end")


def test_callbacks_are_told_and_may_stop() -> None:
    noting = Noting()
    federation(callbacks=[noting]).fit(5)
    assert [each for each in noting.seen if "participant" not in each] == [
        "begin",
        "round 1",
        "round 2",
        "end",
    ]
    assert sorted(each for each in noting.seen if "participant" in each) == sorted(
        [f"participant {each}" for each in range(3)] * 2
    )


def test_callbacks_end_whatever_happens() -> None:
    class Failing(msfusion.Callback):
        def round(self, federation: msfusion.Federation, result: RoundResult) -> None:
            raise ValueError("no more")

    noting = Noting()
    with pytest.raises(ValueError, match="no more"):
        federation(callbacks=[noting, Failing()]).fit(3)
    assert noting.seen[-1] == "end"


def test_files_of_figures_go_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    ours = federation(
        callbacks=[msfusion.CSVFile(path)], metrics={"sure": lambda o, t: o.softmax(1).amax(1).mean()}
    )
    for result in ours.rounds(3):
        if result.number == 2:
            ours.save(tmp_path)
            break
    rest = federation(
        callbacks=[msfusion.CSVFile(path)], metrics={"sure": lambda o, t: o.softmax(1).amax(1).mean()}
    ).resume(tmp_path)
    rest.fit(1)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert all(0 < float(row["sure"]) < 1 for row in rows)


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    ours = federation(callbacks=[msfusion.Checkpoints(tmp_path, every=2, figure="accuracy")])
    history = ours.fit(5)
    best = max(history, key=lambda result: result.figures()["accuracy"]).number  # the first of equals
    kept = [federation().resume(tmp_path / name).done for name in ("best", "last")]
    assert kept == [best, 5]


def test_it_stops_where_nothing_improves() -> None:
    ours = federation(
        callbacks=[msfusion.EarlyStopping("loss", patience=2)],
        training=msfusion.Training(learning_rate=1e-30, momentum=0.0),
        method=msfusion.FedAvg(),
    )
    assert [result.number for result in ours.fit(10)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="there is no figure 'f1'"):
        federation(callbacks=[msfusion.EarlyStopping("f1")]).fit(1)


def test_lines_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    federation(callbacks=[msfusion.Printed()]).fit(2)
    first, second = capsys.readouterr().out.splitlines()
    federation(callbacks=[msfusion.Printed()], method=None).fit(1)
    assert "the small model alone" in capsys.readouterr().out
    assert first.startswith("round 1/2: training_loss ")
    assert "accuracy" in second


def test_events_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    federation(callbacks=[msfusion.TensorBoard(tmp_path)]).fit(1)
    assert list(tmp_path.glob("events*"))


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
        ({"training": [TRAINING]}, "3 participants and 1 training settings"),
        ({"loss": 3}, "the loss is a int"),
        ({"metrics": {"loss": abs}}, "as one of ours"),
        ({"metrics": {"m": 3}}, "the metric 'm' is a int"),
        ({"fraction": 0.0}, "the fraction of participants"),
        ({"method": msfusion.MSfusion(ratio=(0.5, 0.5))}, "2 width ratios and 3 participants"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        federation(**options).fit(1)


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


def test_a_directory_of_checkpoints_is_gone_on_from(tmp_path: Path) -> None:
    federation(callbacks=[msfusion.Checkpoints(tmp_path)]).fit(3)
    assert federation().resume(tmp_path).done == 3
    with pytest.raises(RunDirectoryError, match="there is no"):
        federation().resume(tmp_path / "elsewhere")


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


class Falling:
    """A metric that gets worse from evaluation to evaluation."""

    def __init__(self, start: float = 0.0) -> None:
        self.value = start

    def reset(self) -> None:
        self.value -= 1

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        targets.zero_()  # what it is given is its own

    def compute(self) -> float:
        return self.value


def test_the_best_stays_the_best_after_a_resume(tmp_path: Path) -> None:
    for start, saved in ((0.0, None), (-2.0, "last")):
        metric, kept = Falling(start), msfusion.Checkpoints(tmp_path, figure="m")
        stopping = msfusion.EarlyStopping("m", patience=3)
        ours = federation(metrics={"m": metric}, callbacks=[kept, stopping])
        if saved:
            ours.resume(tmp_path / saved)
            assert [result.number for result in ours.rounds(4)] == [
                3,
                4,
            ]  # as without a break: three without a better
        else:
            for result in ours.rounds(6):
                if result.number == 2:
                    break
        assert ours.test is not None
        assert bool(ours.test.targets.any())
    assert federation(metrics={"m": Falling()}).resume(tmp_path / "best").done == 1


def test_callbacks_that_could_never_do_anything_are_refused(tmp_path: Path) -> None:
    for options, callback in (
        ({"test": None}, msfusion.EarlyStopping("loss")),
        ({}, msfusion.EarlyStopping("perplexity")),
        ({"test": None}, msfusion.Checkpoints(tmp_path)),
    ):
        with pytest.raises(ConfigError, match="there is no figure"):
            federation(callbacks=[callback], **options).fit(1)
    for make in (lambda: msfusion.EarlyStopping(patience=0), lambda: msfusion.Checkpoints(tmp_path, every=0)):
        with pytest.raises(ConfigError, match="at least 1"):
            make()


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


def mistaken(*given: Any, **more: Any) -> dict[str, Tensor]:
    raise KeyError("a mistake")


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (all_of_it, "gives 16 of 16 units"),
        (nothing, "give a dict with a tensor"),
        (by_chance, "another window when it is asked again"),
        (mistaken, "mistaken failed .KeyError"),
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
