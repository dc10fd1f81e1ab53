"""Split learning between two terminals: one holds the data and the first layers, the other the rest of the network.

    python examples/two_terminals.py --tell    # prints a command for each terminal
    python examples/two_terminals.py           # starts both, as processes that talk over this machine's loopback

On two machines it is the same, with TLS: `docs/many-machines.md`. It needs `pip install -e '.[cli,stream]'`.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path(__file__).with_name("split_digits.toml")


def commands(address: str, out: str, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """What to say in the first terminal, and in the second. Both must say the same of the job."""
    same = [str(CONFIG), "--address", address, "--plain-text"]
    same += [part for setting in ("participants.count=1", *settings) for part in ("--set", setting)]
    return ["serve", *same, "--out", out], ["join", *same, "--participant", "0"]


def free_address() -> str:
    """An address of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def main(out: str, settings: Sequence[str] = ()) -> dict[str, object]:
    """Starts both and waits for them; returns the run's summary."""
    msfusion = [sys.executable, "-m", "msfusion"]
    server, participant = (
        subprocess.Popen([*msfusion, *each]) for each in commands(free_address(), out, settings)
    )
    try:
        # whoever is first waits for the other; where one ends too soon, the other would wait long
        waiting = [server, participant]
        while waiting:
            if any(each.poll() for each in waiting):
                sys.exit("one of the two has not ended well: what it said stands above")
            waiting = [each for each in waiting if each.returncode is None]
            time.sleep(0.1)
    finally:
        for process in (server, participant):
            process.kill()
            process.wait()
    summary = json.loads((Path(out) / "summary.json").read_text())
    print(f"accuracy {summary['accuracy']:.1%}; {out}/report.html tells what has crossed")
    return summary


if __name__ == "__main__":
    if "--tell" in sys.argv:
        for number, command in enumerate(commands("127.0.0.1:7000", "runs/two-terminals", ()), start=1):
            print(f"# terminal {number}\n{shlex.join(['msfusion', *command])}")
    else:
        main(tempfile.mkdtemp(prefix="two-terminals-") + "/run", ["rounds=3"])
