"""A federation over gRPC that is struck in every round: killed, stopped and cut-off participants, a server that is
killed, slow links, and hostile peers. All are real processes on this machine's loopback.

    python benchmarks/chaos.py --out chaos.json                     50 participants, 20 rounds, both ways of waiting
    python benchmarks/chaos.py --mode wait --participants 8 --rounds 5
    python benchmarks/chaos.py --quick                              four participants, three rounds

- "wait": the server waits for everybody. The model must be that of `msfusion train` undisturbed, byte for byte. The
  hostile are strangers, who are refused.
- "leave out": the server goes on without those that are away or late. The model must be that of one process in which
  the same are left out of the same rounds. Some participants are hostile, each with a valid token.

Nobody is started again but what was killed, each with the command that it had, and the server once more where somebody
was away when the run ended. The goodput is the share of the examples in trainings that were begun whose update counts;
a training that was cut off counts as begun, whole. Prints JSON; exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from chaos_links import Link, Links
from chaos_processes import Forge, finish, memory_of, warm

if TYPE_CHECKING:
    from chaos_hostile import Hostile

METHODS = {
    "blocks": ["method.name=msfusion", "method.start=blocks", "participants.ratio=0.5"],
    "fresh": ["method.name=msfusion", "method.start=fresh", "participants.ratio=0.5"],
    "small": ["method.name=small", "participants.ratio=0.5"],
}
EPOCHS = 2
STRIKES = ("kill", "stop", "cut")
SLOW = Link(rate=1e6 / 8, delay=0.2)
MEMORY_SECONDS = 3.0
LAST_WORD_SECONDS = 15.0
"""After the end of the server, how long participants have until it is started again for those that were away."""


def settings_of(options: argparse.Namespace, count: int) -> list[str]:
    """Of the job, which every process has."""
    return [
        f"rounds={options.rounds}",
        f"seed={options.seed}",
        f"participants.count={count}",
        f"data.max_train={min(1400, 30 * count)}",
        "data.max_test=200",
        "data.alpha=1.0",
        "model.name=convnet",
        f"training.local_epochs={EPOCHS}",
        "run.workers=1",
        *METHODS[options.method],
    ]


@dataclass
class Federation:
    """Where a run's files are, and the commands of its processes. All paths are relative to `folder`."""

    folder: Path
    name: str
    count: int
    port: int
    waiting: list[str]

    def _access(self, who: str) -> list[str]:
        return ["--certificates", f"{self.name}/keys/{who}"]

    @property
    def job(self) -> str:
        """The configuration."""
        return f"{self.name}/job.toml"

    def serve(self) -> list[str]:
        """The server's command."""
        where = ["--address", f"127.0.0.1:{self.port}", "--out", f"{self.name}/served"]
        return ["serve", self.job, *where, *self._access("server"), *self.waiting]

    def join(self, who: int, port: int) -> list[str]:
        """A participant's command."""
        where = ["--address", f"127.0.0.1:{port}", "--participant", str(who), "--out", f"{self.name}/kept"]
        return ["join", self.job, *where, *self._access(f"participant-{who}")]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of all rounds that are done."""
        with suppress(OSError, ValueError):
            text = (self.folder / self.name / "served" / "metrics.jsonl").read_text()
            return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return []

    def said(self, who: str) -> str:
        """The file of what a process says."""
        return f"{self.name}/{who}.txt"


@dataclass
class Storm:
    """One run with all that strikes it. `pace` is how many seconds a round takes undisturbed, `lasting` draws for how
    many seconds somebody stays stopped or cut off.
    """

    options: argparse.Namespace
    forge: Forge
    federation: Federation
    links: Links
    honest: int
    pace: float
    lasting: Callable[[], float]
    draws: random.Random
    strikes: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    most_memory: int = 0
    begin: float = field(default_factory=time.monotonic)
    _timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbered: int = 0

    def run(self) -> dict[str, Any]:
        """Until server and participants have ended; what happened."""
        self.server: int | None = None
        self.who: dict[int, int] = {}  # by process
        self.process: dict[int, int] = {}  # by participant
        self.struck: set[int] = set()
        self.killed: set[int] = set()  # processes
        self.finished: set[int] = set()
        self.served, self.over_since = False, 0.0
        self._start_server()
        for each in range(self.honest):
            self._start(each)
        self._later(0.0, self._watch_memory)
        planned, rounds = -1, self.options.rounds
        begun: list[float] = []
        while len(self.finished) < self.honest or self.server is not None:
            done = len(self.federation.metrics())
            if planned < min(done, rounds - 1) and (done or self._all_came()):
                planned = done
                begun.append(time.monotonic())
                self._plan(done)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
            for process, code in self.forge.ended().items():
                self._ended(process, code)
            self._tell_the_absent()
            if self.faults or time.monotonic() - self.begin > self.options.limit:
                self.faults.append(f"not done after {time.monotonic() - self.begin:.0f} seconds")
                break
            time.sleep(0.02)
        return {
            "seconds": round(time.monotonic() - self.begin, 1),
            "seconds_of_a_round": [round(after - before, 1) for before, after in pairwise(begun)],
            "strikes": dict(self.strikes),
            "restarts": dict(self.restarts),
            "most_memory_bytes": self.most_memory,
            "faults": self.faults,
        }

    # Processes.

    def _start_server(self) -> None:
        self.server = self.forge.start(self.federation.said("server"), *self.federation.serve())

    def _start(self, who: int) -> None:
        name = f"participant-{who}"
        process = self.forge.start(
            self.federation.said(name),
            *self.federation.join(who, self.links.links[who].port),
            trained=self.federation.said(f"trained-{who}"),
            epochs=EPOCHS,
        )
        self.who[process], self.process[who] = who, process

    def _all_came(self) -> bool:
        said = self.federation.folder / self.federation.said("server")
        text = said.read_text() if said.exists() else ""
        return all(f"participant {who} has come" in text for who in range(self.honest))

    def _ended(self, process: int, code: int) -> None:
        expected = process in self.killed
        self.killed.discard(process)
        if process == self.server:
            self.server = None
            if expected:
                self._later(self.draws.uniform(0.3, 1.0), self._server_again)
            self.served, self.over_since = self.served or code == 0, time.monotonic()
            if code and not expected:
                self.faults.append(f"the server ended with {code}: {self._last_words('server')}")
        elif process in self.who:
            who = self.who.pop(process)
            if code == 0:
                self.finished.add(who)
                self.struck.discard(who)
            elif expected:
                self._later(self.draws.uniform(0.3, 1.0), lambda: self._again(who))
            else:
                self.faults.append(
                    f"participant {who} ended with {code}: {self._last_words(f'participant-{who}')}"
                )

    def _last_words(self, who: str) -> str:
        return (self.federation.folder / self.federation.said(who)).read_text().strip()[-500:]

    def _tell_the_absent(self) -> None:
        """Where somebody was away when the run ended, the server is started again: it has but this to say."""
        over = self.served and self.server is None and time.monotonic() - self.over_since > LAST_WORD_SECONDS
        if over and len(self.finished) < self.honest and not self.struck:
            self.restarts["server, for those that were away at the end"] += 1
            self._start_server()

    # What strikes.

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._numbered += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._numbered, action))

    def _plan(self, done: int) -> None:
        """Who is struck in the round after so many, how, and when."""
        free = sorted(set(range(self.honest)) - self.struck - self.finished)
        number = max(1, round(self.options.struck * self.honest))
        for place, who in enumerate(self.draws.sample(free, min(number, len(free)))):
            how = STRIKES[(place + done) % len(STRIKES)]
            self.struck.add(who)
            self._later(self.draws.uniform(0.0, self.pace), lambda how=how, who=who: self._strike(how, who))
        kills, rounds = self.options.kills, self.options.rounds
        due = sum(1 for each in range(kills) if (each + 1) * rounds // (kills + 1) == done)
        for each in range(due):
            self._later(self.draws.uniform(0.0, self.pace) + 4.0 * each, self._kill_server)

    def _strike(self, how: str, who: int) -> None:
        process = self.process[who]
        if who in self.finished or process not in self.who:
            self.struck.discard(who)
            return
        self.strikes[how] += 1
        if how == "kill":
            self.killed.add(process)
            os.kill(process, signal.SIGKILL)  # and started again once it has ended
        elif how == "stop":
            os.kill(process, signal.SIGSTOP)
            self._later(self.lasting(), lambda: self._continue(who, process))
        else:
            self.links.cut(who)
            self._later(self.lasting(), lambda: self._join(who))

    def _again(self, who: int) -> None:
        self.restarts["participants that were killed"] += 1
        self._start(who)
        self.struck.discard(who)

    def _continue(self, who: int, process: int) -> None:
        os.kill(process, signal.SIGCONT)
        self.struck.discard(who)

    def _join(self, who: int) -> None:
        self.links.join(who)
        self.struck.discard(who)

    def _kill_server(self) -> None:
        if self.served:
            return
        if self.server is None or self.server in self.killed:
            self._later(1.0, self._kill_server)
            return
        self.strikes["kill of the server"] += 1
        self.killed.add(self.server)
        os.kill(self.server, signal.SIGKILL)

    def _server_again(self) -> None:
        self.restarts["server, killed"] += 1
        self._start_server()

    def _watch_memory(self) -> None:
        processes = [os.getpid(), self.forge.process, *self.who, *([self.server] if self.server else [])]
        self.most_memory = max(self.most_memory, memory_of(processes))
        self._later(MEMORY_SECONDS, self._watch_memory)


def measured(options: argparse.Namespace, mode: str, forge: Forge, folder: Path) -> dict[str, Any]:
    """One run of a mode, and what it should have been."""
    wait, name = mode == "wait", mode.replace(" ", "-")
    honest, hostile = options.participants, 0 if wait else options.hostile
    count = honest + hostile
    (folder / name).mkdir()
    text = "\n".join(f"# {each}" for each in settings_of(options, count))
    (folder / name / "job.toml").write_text(f"{text}\n{_toml(settings_of(options, count))}")
    job = ["train", f"{name}/job.toml", "--out", f"{name}/undisturbed", "--quiet"]
    finish(forge, f"{name}/undisturbed.txt", folder, *job)
    lines = (folder / name / "undisturbed" / "metrics.jsonl").read_text().splitlines()
    pace = statistics.median(json.loads(line)["seconds"] for line in lines)
    keys = ["certificates", "--out", f"{name}/keys", "--host", "127.0.0.1", "--participants", str(count)]
    finish(forge, f"{name}/keys.txt", folder, *keys)
    finish(forge, f"{name}/keys.txt", folder, *keys[:2], f"{name}/other-keys", *keys[3:])
    patience = round(max(10.0, 2.5 * pace), 1)
    waiting = [] if wait else ["--patience", str(patience), "--deadline", str(patience)]
    federation = Federation(folder, name, count, free_port(), waiting)
    draws = random.Random(f"{options.seed} {mode}")
    slow = set(draws.sample(range(honest), round(options.slow * honest)))
    links = [Link(SLOW.rate, SLOW.delay) if each in slow else Link() for each in range(honest)]
    from chaos_hostile import end, hostile_peers  # gRPC, which is imported after the fork

    peers, strangers = hostile_peers(options, federation, honest, patience)

    def lasting() -> float:
        return draws.uniform(1.0, 4.0) if wait else draws.uniform(0.3, 1.5) * patience

    with Links(("127.0.0.1", federation.port), links) as proxies:
        storm = Storm(options, forge, federation, proxies, honest, pace, lasting, draws)
        threads = [each.start() for each in (*peers, strangers)]
        report = storm.run()
        end(peers, strangers, threads)
    report |= {
        "mode": mode,
        "method": options.method,
        "participants": honest,
        "hostile": hostile,
        "slow_links": len(slow),
        "access": "TLS and tokens",
        "seconds_of_an_undisturbed_round_in_one_process": round(pace, 2),
        "patience_and_deadline": None if wait else patience,
        "strangers": dict(strangers.ends),
        "attacks": dict(sum((each.attacks for each in peers), Counter())),
        "ends_of_hostile_streams": dict(sum((each.ends for each in peers), Counter())),
    }
    return report | judged(options, federation, honest, peers)


def judged(
    options: argparse.Namespace, federation: Federation, honest: int, peers: list[Hostile]
) -> dict[str, Any]:
    """Whether the model is what it should be, and how much of the work went into it."""
    lines = federation.metrics()
    served = federation.folder / federation.name / "served" / "model.safetensors"
    hostile = range(honest, federation.count)
    if hostile and len(lines) == options.rounds:
        expected = replayed(federation, lines, frozenset(hostile))
    else:
        expected = federation.folder / federation.name / "undisturbed" / "model.safetensors"
    digests = [digest(served), digest(expected)]
    counted = {(who, line["round"]) for line in lines for who in line["participants"]}
    said = {(each.participant, number) for each in peers for number in each.valid}
    intruded = sorted(pair for pair in counted if pair[0] in hostile and pair not in said)
    left_out = Counter(each["participant"] for line in lines for each in line.get("left_out", ()))
    return {
        "rounds": len(lines),
        "identical": digests[0] is not None and digests[0] == digests[1],
        "sha256": digests[0],
        "bad_updates_that_counted": len(intruded),
        "left_out": {
            "honest": sum(times for who, times in left_out.items() if who not in hostile),
            "hostile": sum(times for who, times in left_out.items() if who in hostile),
        },
        **goodput(federation, honest, counted),
        "tracebacks": sum(
            "Traceback" in path.read_text(errors="replace")
            for path in (federation.folder / federation.name).glob("*.txt")
        ),
    }


def goodput(federation: Federation, honest: int, counted: set[tuple[int, int]]) -> dict[str, Any]:
    """Examples in trainings whose update counts, of those in all trainings that were begun."""
    begun: Counter[str] = Counter()
    for who in range(honest):
        path = federation.folder / federation.said(f"trained-{who}")
        times: Counter[int] = Counter()
        examples = 0
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            times[line["round"]] += 1
            examples = line["examples"]
        for number, each in times.items():
            counts = (who, number) in counted
            begun["examples trained"] += each * examples
            begun["examples whose update counts"] += counts * examples
            begun["examples trained again"] += (each - 1) * examples
            begun["examples left out"] += (not counts) * examples
    share = begun["examples whose update counts"] / max(1, begun["examples trained"])
    return {"goodput": round(share, 4), **begun}


def _toml(settings: list[str]) -> str:
    from msfusion.experiment.config import load_config

    return load_config(None, settings).to_toml()


def replayed(federation: Federation, lines: list[dict[str, Any]], hostile: frozenset[int]) -> Path:
    """The model of one process in which the same were left out of the same rounds."""
    from chaos_replay import Replayed

    from msfusion.experiment.agreement import prepared_for_network
    from msfusion.experiment.config import load_config
    from msfusion.experiment.train import train

    def preparing(config: Any, parts: Any) -> Any:
        prepared = prepared_for_network(config, parts)
        prepared.engine = Replayed(lines, hostile)
        return prepared

    out = federation.folder / federation.name / "replayed"
    train(load_config(federation.folder / federation.job), out, preparing=preparing)
    return out / "model.safetensors"


def digest(path: Path) -> str | None:
    """None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=["wait", "leave out", "both"], default="both")
    parser.add_argument("--method", choices=METHODS, default="blocks")
    parser.add_argument("--participants", type=int, default=50, help="honest ones")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hostile", type=int, default=3, help="participants, where some are left out")
    parser.add_argument("--kills", type=int, default=5, help="of the server, over the run")
    parser.add_argument("--struck", type=float, default=0.3, help="the share of the participants in a round")
    parser.add_argument("--slow", type=float, default=0.2, help="the share of links of 1 Mbit/s and 200 ms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=3000.0, help="seconds of a run, before it is given up")
    parser.add_argument(
        "--quick", action="store_true", help="4 participants, 3 rounds, one kill of the server"
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="a new folder, in which all files stay")
    parser.add_argument("--out", metavar="FILE", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.participants, options.rounds, options.kills, options.hostile = 4, 3, 1, 1
    return options


def main() -> None:
    options = options_given()
    folder = Path(options.keep or tempfile.mkdtemp()).resolve()
    folder.mkdir(exist_ok=True)
    modes = ["wait", "leave out"] if options.mode == "both" else [options.mode]
    counts = [options.participants + options.hostile * (mode != "wait") for mode in modes]
    forge = Forge(folder, lambda: warm([settings_of(options, count) for count in counts]))
    try:
        runs = [measured(options, mode, forge, folder) for mode in modes]
    finally:
        forge.close()
        if options.keep is None:
            shutil.rmtree(folder)
    from msfusion.experiment.environment import environment

    text = json.dumps({"runs": runs, "environment": environment()}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(not all(is_right(options, run) for run in runs))


def is_right(options: argparse.Namespace, run: dict[str, Any]) -> bool:
    """Nothing lost, nobody bad let in, nobody helped by hand."""
    wrong = (
        run["faults"] or run["bad_updates_that_counted"] or run["tracebacks"] or "LET IN" in run["strangers"]
    )
    return bool(run["identical"] and run["rounds"] == options.rounds and not wrong)


if __name__ == "__main__":
    main()
