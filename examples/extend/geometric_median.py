"""An average and a metric of one's own: a geometric median (Pillutla et al., IEEE TSP 2022), and macro recall.

msfusion train --set method.name=small --set method.average=geometric_median:geometric_median
msfusion train --set 'evaluation.metrics=["geometric_median:macro_recall"]'
"""

from __future__ import annotations

import torch
from torch import Tensor

import msfusion


@msfusion.average("geometric_median")
def geometric_median(values: Tensor) -> Tensor:
    """Of each tensor by itself the point with the least sum of distances to all values, by Weiszfeld's steps.

    `values` has one participant's tensor for each index of axis 0, and nan where it held no such entry.
    """
    sizes = values.nan_to_num().reshape(len(values), -1).square().sum(1)
    values = values[sizes.argsort(stable=True)]  # sums round alike, whatever the order of the participants
    there = ~values.isnan()
    known = torch.where(there, values, 0.0)
    point = known.sum(0) / there.sum(0).clamp(min=1)
    for _ in range(32):
        apart = torch.where(there, known - point, 0.0).reshape(len(values), -1).norm(dim=1).clamp(min=1e-8)
        shares = torch.where(there, (1 / apart).view(-1, *[1] * (values.ndim - 1)), 0.0)
        point = (shares * known).sum(0) / shares.sum(0).clamp(min=1e-30)
    return point


@msfusion.metric("macro_recall")
def macro_recall(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the classes of the share of their examples that is found."""
    right = (outputs.argmax(-1) == targets).double()
    return torch.stack([right[targets == each].mean() for each in targets.unique()]).mean()
