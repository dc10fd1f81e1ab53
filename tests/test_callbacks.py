"""Who is told of a federation's rounds: in which order, what is written, and when a run ends early."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from federations import Falling, federation

import msfusion
from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.federated.results import RoundResult


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


def test_a_directory_of_checkpoints_is_gone_on_from(tmp_path: Path) -> None:
    federation(callbacks=[msfusion.Checkpoints(tmp_path)]).fit(3)
    assert federation().resume(tmp_path).done == 3
    with pytest.raises(RunDirectoryError, match="there is no"):
        federation().resume(tmp_path / "elsewhere")


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
