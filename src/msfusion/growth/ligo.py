"""LiGO: learn how to grow (Wang et al., ICLR 2023, arXiv 2303.00980).

    W' = B_out W B_in^T,   b' = B_out b,   gamma' = B gamma,   E' = E B^T;   target layer k = sum_l w[k, l] * layer l

One matrix per index space: a single one for the residual stream wherever it stands, one per layer for queries, keys,
values and the hidden features of the feed-forward layer; the output projection reads what the values write.

Dual-LiGO (Fed-Grow, arXiv 2406.13450) is two of them, one after the other: a participant's private operator grows its
own model to a common intermediate shape, the shared one grows the intermediate to the target. The shared operator's
tensors have names and shapes that depend on the intermediate and the target alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from msfusion.errors import GrowthError
from msfusion.growth.axes import Role
from msfusion.growth.copying import Copy
from msfusion.growth.plan import GrowthPlan, Space
from msfusion.growth.starts import Start, copied_from, depth_start, kept_rows, width_start
from msfusion.width.groups import State
from msfusion.width.tensors import place_tensor

Form = Literal["full", "padded"]


class LiGO(nn.Module):
    """A learned linear growth operator from one model to another. Its parameters are all that it holds.

    `start`: see `Start`; or growth by copies (`Copy`), from which the operator then departs. What preserves the
    function writes, reads and normalises an index space by different matrices, so such an operator has one for each.
    `form`: "full" matrices, or "padded": [I; C], of which only C trains (the released code's; the identity stands at
    the rows of the units that are kept). `tied`: weights are read through the same matrix as they are written (A = B),
    as in the paper; otherwise every space has a second matrix A for the weights that sum over it, and with the width
    start "copy" these divide by the number of copies (Net2Net, arXiv 1511.05641).
    The same arguments give the same operator: starts are drawn from `seed`.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        start: Start | Copy | None = None,
        *,
        form: Form = "full",
        tied: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise GrowthError(
                f"an operator cannot have the form {form!r}: choose one of {', '.join(get_args(Form))}"
            )
        self.plan, self.form, self.tied = plan, form, tied
        self._new_rows: dict[str, Tensor] = {}  # of padded matrices, by space
        self._copy = start if isinstance(start, Copy) else None
        if isinstance(start, Copy):
            self._place_copies(start)
        else:
            self._place_start(start or Start(), seed)

    def _place_copies(self, start: Copy) -> None:
        """A matrix for each role of each index space, as the copies have them."""
        if self.form == "padded":
            raise GrowthError(
                "[I; C] has one matrix a space: an operator that starts from copies must be full"
            )
        for name in self.plan.spaces:
            for role in self.plan.roles(name):
                self._place(f"width.{name}.{role}", start.matrix(name, role).float())
        for kind in self.plan.layers:
            self._place(f"depth.{kind}.w", start.layers(kind).float())

    def _place_start(self, start: Start, seed: int) -> None:
        """One matrix for each index space, or two."""
        plan, form, tied = self.plan, self.form, self.tied
        if form == "padded" and (start.width == "random" or not tied):
            raise GrowthError(
                "[I; C] keeps the old units: it needs a tied operator that starts as copy or average"
            )
        generator = torch.Generator().manual_seed(seed)
        for name, space in plan.spaces.items():
            matrix = width_start(space, start, generator)
            if form == "padded":
                self._new_rows[name] = _new_rows(space)
                self._place(f"width.{name}.C", matrix[self._new_rows[name]])
                continue
            self._place(f"width.{name}.B", matrix)
            if not tied:
                copies = torch.bincount(copied_from(space)) if start.width == "copy" else 1
                self._place(f"width.{name}.A", matrix / copies)
        for kind, (source, target) in plan.layers.items():
            self._place(f"depth.{kind}.w", depth_start(source, target, start.depth, generator))

    def _place(self, name: str, tensor: Tensor) -> None:
        place_tensor(self, name, nn.Parameter(tensor), True)

    def tensors(self) -> dict[str, Tensor]:
        """The operator's tensors by name: all that anyone needs beside the plan. Detached, but not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over another operator's tensors. GrowthError, naming one, where names or shapes differ."""
        own = dict(self.named_parameters())
        if set(tensors) != set(own):
            odd = sorted(set(tensors) ^ set(own))[0]
            raise GrowthError(f"these are not this operator's tensors: {odd!r} is in one of them only")
        for name, parameter in own.items():
            if tensors[name].shape != parameter.shape:
                raise GrowthError(
                    f"tensor {name!r} has shape {list(tensors[name].shape)} where the operator has "
                    f"{list(parameter.shape)}: it is another operator's"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def materialise(self, state: State) -> dict[str, Tensor]:
        """The target's tensors, from the source's `state_dict()`; gradients flow back to the operator.

        Raises GrowthError, naming the tensor, where the state is not the source's.
        """
        own = dict(self.named_parameters())
        made: dict[str, Tensor] = {}

        def matrix(space: str, role: Role) -> Tensor:
            if self._copy is not None:
                return own[f"width.{space}.{role}"]
            if self.form == "full":
                letter = "A" if role == "contract" and not self.tied else "B"
                return own[f"width.{space}.{letter}"]
            if space not in made:
                made[space] = self._padded(space, own[f"width.{space}.C"])
            return made[space]

        grown = self.plan.grow(state, matrix, {kind: own[f"depth.{kind}.w"] for kind in self.plan.layers})
        return grown if self._copy is None else self._copy.finished(grown)

    def _padded(self, name: str, new: Tensor) -> Tensor:
        """[I; C], the identity at the rows of the units that are kept."""
        space = self.plan.spaces[name]
        matrix = new.new_zeros(space.target, space.source)
        matrix[kept_rows(space), torch.arange(space.source)] = 1.0
        matrix[self._new_rows[name]] = new
        return matrix


def _new_rows(space: Space) -> Int[Tensor, " new"]:
    """The target indices of a space that are not kept units."""
    new = torch.ones(space.target, dtype=torch.bool)
    new[kept_rows(space)] = False
    return new.nonzero().flatten()
