"""Is the large model better than the small one, seed by seed? From what comparisons have written; prints JSON.

For each row beside `small` (of the same ratio, variant and rounds), in points of accuracy, or in per cent of the small
model's perplexity: the difference of each seed, its mean and standard deviation, the lower bound of a one-sided 90 %
interval (Student's t), how many standard deviations it is ahead, and what it costs beside `small`. Positive is better.

    python benchmarks/paired.py benchmarks/results/cifar10_long.json runs/my_comparison/compare.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msfusion.experiment.comparison import role_of
from msfusion.experiment.report.cells import beside

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="compare.json of a comparison, or benchmarks/results"
    )
    found = {str(path): differences(json.loads(path.read_text())) for path in parser.parse_args().results}
    print(json.dumps(found, indent=1, allow_nan=False))


def differences(result: Row) -> list[dict[str, Any]]:
    """A row for each method and variant that stands beside `small`."""
    rows = []
    for cell in result["cells"]:
        small = beside(cell, result["cells"], "floor", cell["ratio"])
        if small is None or role_of(cell["method"]) is not None:
            continue
        gained = _gains(cell, small)
        closed = (cell.get("gap_closed") or {}).get("share")
        rows.append(
            {
                "row": " ".join(filter(None, (cell["method"], cell["variant"], str(cell["ratio_label"])))),
                "rounds": cell["rounds"],
                "unit": "per cent of perplexity" if "perplexity" in cell else "points of accuracy",
                "by_seed": [round(each, 3) for each in gained],
                **bounds(gained),
                "gap_closed": closed,
                "flops_beside_small": round(cell["total_flops"] / small["total_flops"], 4),
                "bytes_beside_small": round(cell["total_bytes"] / small["total_bytes"], 4),
                "flops_of_an_answer_beside_small": round(
                    cell["inference_flops_per_example"] / small["inference_flops_per_example"], 3
                ),
            }
        )
    return rows


def bounds(gained: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation, the lower 90 % bound, and the mean in standard deviations; None for one seed."""
    mean = statistics.fmean(gained)
    if len(gained) == 1:
        return {"mean": round(mean, 3), "sd": None, "lower_90": None, "ahead_by_sd": None}
    from scipy.stats import t

    sd = statistics.stdev(gained)
    lower = mean - float(t.ppf(0.9, len(gained) - 1)) * sd / math.sqrt(len(gained))
    ahead = round(mean / sd, 2) if sd > 0 else None
    return {"mean": round(mean, 3), "sd": round(sd, 3), "lower_90": round(lower, 3), "ahead_by_sd": ahead}


def _gains(cell: Row, small: Row) -> list[float]:
    """What each seed has gained; a perplexity that is lower has."""
    if "perplexity" in cell:
        pairs = zip(cell["perplexity"]["values"], small["perplexity"]["values"], strict=True)
        return [100 * (1 - ours / theirs) for ours, theirs in pairs]
    pairs = zip(cell["accuracy"]["values"], small["accuracy"]["values"], strict=True)
    return [100 * (ours - theirs) for ours, theirs in pairs]


if __name__ == "__main__":
    main()
