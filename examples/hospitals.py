"""Six hospitals with unequal machines, one with a slow line and one that is often away: does the slow one hold up all?

    python examples/hospitals.py

trains `hospitals.toml` twice, on the same simulated clock: once everybody is waited for; once a round ends after half
a second, and who is late by then counts by half when it arrives. It needs `pip install -e '.[cli]'`, and a minute.

`msfusion plan examples/hospitals.toml` says beforehand who holds what, and
`msfusion compare examples/hospitals.toml --out DIR` makes tables and a page of the same comparison.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msfusion.experiment.config import load_config
from msfusion.experiment.train import train

CONFIG = Path(__file__).with_name("hospitals.toml")
WAYS = {
    "everybody is waited for": [],
    "rounds of half a second": ["network.deadline=0.5", "network.late=downweight"],
}


def attendance(run: Path) -> tuple[dict[str, Counter[int]], float]:
    """How often each hospital was late, away, or arrived with work of an earlier round; and the simulated seconds."""
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = {
        "late": Counter(who for each in rounds for who in each.get("late", ())),
        "absent": Counter(who for each in rounds for who in each.get("absent", ())),
        "arriving": Counter(who for each in rounds for who, _began in each.get("arriving", ())),
    }
    return counts, sum(each["simulated_seconds"] for each in rounds)


def main(overrides: Sequence[str] = ()) -> dict[str, tuple[dict[str, Counter[int]], float]]:
    """Returns attendance and simulated seconds of both ways."""
    found = {}
    for way, settings in WAYS.items():
        config = load_config(CONFIG, [*settings, *overrides])
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            summary = train(config, run)
            found[way] = counts, seconds = attendance(run)
        print(
            f"\n{way}: {config.rounds} rounds in {seconds:.0f} simulated seconds, accuracy {summary['accuracy']:.1%}"
        )
        for target in summary["targets"]:
            reached = target["simulated_seconds"]
            when = "never" if reached is None else f"after {reached:.1f} simulated seconds"
            print(f"  {target['accuracy']:.0%} reached {when}")
        for who, ratio in enumerate(config.participants.ratio):
            told = ", ".join(f"{what} in {counts[what][who]} rounds" for what in counts if counts[what][who])
            print(f"  hospital {who}, which holds {ratio:.0%} of the width: {told or 'always on time'}")
    return found


if __name__ == "__main__":
    main()
