"""Worker processes: they share the work, tell of errors, die without a hang, and leave when they should."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from averaging import Averaging, some_data
from commands import forked
from simulated import Job, opened, run_rounds

from msfusion.batch import Batch
from msfusion.engines.processes import Processes, WorkerError
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.federated.method import Task, Update
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.screening import Screening

PATH = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
ONCE = RoundSettings(rounds=1)
STOP = Screening("stop")


def jobs(method: Averaging, participants: int) -> list[Job]:
    return [partial(job, method, participant) for participant in range(participants)]


def job(method: Averaging, *participants: int) -> list[Task]:
    return [method.assign(method.initial_state(), 0, participant) for participant in participants]


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(autouse=True)
def _leave_nobody_behind() -> object:
    yield
    assert multiprocessing.active_children() == []


def test_the_work_is_shared_and_workers_live_on() -> None:
    method = Averaging(delay=0.01)
    with opened(Processes(2), method, some_data(6)) as pool:
        first, second = (
            {done.update.metadata["process"] for done in pool.run("train", jobs(method, 6))} for _ in range(2)
        )
    assert len(first) == 2
    assert first == second
    assert os.getpid() not in first


class LeftBehind:
    """In a cycle that nobody holds, until it is collected: then the process that does so is written down."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self

    def __del__(self) -> None:
        self.file.write_text(f"{self.file.read_text() if self.file.exists() else ''}{os.getpid()} ")


class Collecting(Averaging):
    """Collects whatever can be collected while it trains."""

    def train(self, task: Task, data: Batch) -> Update:
        gc.collect()
        return super().train(task, data)


@pytest.mark.release
def test_a_worker_does_not_end_what_the_server_has_left_behind(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        LeftBehind(tmp_path / "ended")
        list(run_rounds(Collecting(), some_data(4), ONCE, workers=2))
        assert not (tmp_path / "ended").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "ended").read_text() == f"{os.getpid()} "


def test_tasks_are_made_when_they_are_needed_and_in_order() -> None:
    method, made, finished, ahead = Averaging(delay=0.001), [], 0, []

    def make(participant: int) -> list[Task]:
        made.append(participant)
        ahead.append(len(made) - finished)
        return job(method, participant)

    with opened(Processes(2), method, some_data(12)) as pool:
        for _ in pool.run("train", [partial(make, participant) for participant in range(12)]):
            finished += 1
    assert made == list(range(12))
    assert max(ahead) <= 2 * 2 + 2  # two for each worker, and what was done but not yet counted


def test_a_long_task_does_not_hold_up_others() -> None:
    method = Averaging(delay=0.02)
    data = [some_data(40)[index] for index in (39, 9, 9)]  # 0.8 s, 0.2 s, 0.2 s
    with opened(Processes(2), method, data) as pool:
        order = [done.update.participant for done in pool.run("train", jobs(method, 3))]
    assert order == [1, 2, 0]


@pytest.mark.release
def test_more_threads_are_used_where_the_parent_used_one() -> None:
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        f"sys.path[:0] = {PATH!r}\n"
        "from averaging import Averaging, some_data\n"
        "from simulated import opened\n"
        "from msfusion.engines.processes import Processes\n"
        "method = Averaging()\n"
        "task = method.assign(method.initial_state(), 0, 0)\n"
        "with opened(Processes(2, threads=2), method, some_data(2)) as pool:\n"
        "    print([done.update.metadata['threads'] for done in pool.run('train', [lambda: [task]] * 2)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2, 2]"


@pytest.mark.parametrize("before", [1, 2])
def test_one_thread_works_whatever_the_parent_used(before: int) -> None:
    torch.set_num_threads(before)
    try:
        torch.ones(1 << 20).sqrt_()
        (result,) = run_rounds(Averaging(), some_data(), ONCE, workers=2)
    finally:
        torch.set_num_threads(1)
    assert len(result.participants) == 5


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(TrainingError, match="trained participant 1 in round 1 was killed by signal 9"):
        list(run_rounds(Averaging((1,), "sigkill"), some_data(), ONCE, workers=2))


@pytest.mark.timeout(60)
def test_a_worker_killed_while_idle_is_an_error() -> None:
    rounds = run_rounds(Averaging(), some_data(), RoundSettings(rounds=2), workers=2)
    next(rounds)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with pytest.raises(TrainingError, match="was killed by signal 9"):
        next(rounds)


def test_our_errors_keep_type_and_sentence() -> None:
    with pytest.raises(DataError, match=r"^participant 1 has a label that is out of range: mend it$"):
        list(run_rounds(Averaging((1,), "data"), some_data(), ONCE, workers=2, screening=STOP))


@pytest.mark.parametrize(
    ("failure", "told"), [("bug", "ZeroDivisionError: a bug"), ("file", "FileNotFoundError: no such file")]
)
def test_other_errors_come_with_their_traceback(failure: str, told: str) -> None:
    with pytest.raises(TrainingError, match=rf"^participant 1 failed in round 1 \({told}\)$") as caught:
        list(run_rounds(Averaging((1,), failure), some_data(), ONCE, workers=2, screening=STOP))
    assert isinstance(caught.value.__cause__, WorkerError)
    assert re.search(rf"(?s)Traceback.*_fail.*{told}", str(caught.value.__cause__))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_closing_ends_workers_that_still_work() -> None:
    begin = time.monotonic()
    rounds = run_rounds(
        Averaging((4,), "sleep"), some_data(), ONCE, workers=2, on_participant=lambda _: rounds_error()
    )

    def rounds_error() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    assert time.monotonic() - begin < 10


def test_closing_between_rounds_ends_the_workers() -> None:
    rounds = run_rounds(Averaging(), some_data(), RoundSettings(rounds=3), workers=2)
    next(rounds)
    assert len(multiprocessing.active_children()) == 2
    rounds.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_leave_with_a_killed_parent_even_while_they_work() -> None:
    ours, theirs = multiprocessing.Pipe()

    def train() -> None:
        method = Averaging((0, 1), "sleep")
        with opened(Processes(2), method, some_data(2)) as pool:
            theirs.send([child.pid for child in multiprocessing.active_children()])
            list(pool.run("train", jobs(method, 2)))

    parent = forked(train)
    workers = ours.recv()
    time.sleep(0.2)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2
    assert not any(alive(worker) for worker in workers)


@pytest.mark.release
@pytest.mark.slow
def test_workers_can_be_started_afresh() -> None:
    method = Averaging()
    with opened(Processes(1, start_method="spawn"), method, some_data(2)) as pool:
        done = list(pool.run("train", jobs(method, 2)))
    assert [entry.update.participant for entry in done] == [0, 1]


def test_a_method_that_cannot_be_pickled_is_refused_where_forking_is_not_possible() -> None:
    class Local(Averaging):
        pass

    alone = Processes(1, start_method="spawn")
    with pytest.raises(ConfigError, match="set workers to 1"), opened(alone, Local(), some_data(2)):
        pass


@pytest.mark.timeout(60)
def test_more_threads_after_the_parent_used_some_work_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msfusion.engines.processes.THREADS_TIMEOUT", 1.0)
    sentence = "none"
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).sqrt_()
        with opened(Processes(1, threads=2), Averaging(), some_data(2)):
            pass
    except ConfigError as error:
        sentence = str(error)
    finally:
        torch.set_num_threads(1)
    assert sentence == "none" or "call torch.set_num_threads(1) at the start of your program" in sentence
