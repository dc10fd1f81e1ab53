"""The sum of blocks as the one large model: the same answers, with weights of zero between the blocks.

With W_b the weights of block b between two layers, the large model's are the block-diagonal

    W  =  diag(W_0, W_1, ..., W_{m-1})

and a bias that no block has for itself (that of the logits) is the sum of theirs. So who needs a model of the
configuration's class has one. It does not hold where something couples units of different blocks, as a LayerNorm does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msfusion.federated.states import holding, loaded, part
from msfusion.methods.blocks import BlocksMethod, block_window
from msfusion.models.sums import label
from msfusion.objectives import logits_of
from msfusion.width.groups import State, WidthMap
from msfusion.width.slices import plan
from msfusion.windows import window_size


def one_wide_state(method: BlocksMethod, width_map: WidthMap, state: State) -> dict[str, Tensor] | None:
    """The sum of blocks as a state of the large model, with zeros between the blocks; None where it is not the same.

    It is where no operator couples units of different blocks (a norm over all of them does) and the blocks' units are
    all of them, none twice. That is tried, on the example that was traced, with blocks that all have a say.
    """
    ratio, count = method.capacities.smallest, len(method.starts)
    if any(window_size(ratio, group.units) * count != group.units for group in width_map.groups):
        return None
    wide: dict[str, Tensor] = {}
    for block in range(count):
        cuts = plan(width_map, block_window(width_map, ratio, block))
        for name, tensor in part(state, label(block)).items():
            if name not in wide:
                wide[name] = torch.zeros(width_map.shapes[name], dtype=tensor.dtype)
            if cuts[name].axes:
                cuts[name].put(wide[name], tensor)
            elif tensor.is_floating_point():
                wide[name] += tensor  # nothing in it is a block's own: a bias of the logits
            else:
                wide[name].copy_(tensor)
    return wide


def is_one_wide_model(method: BlocksMethod, model: nn.Module, width_map: WidthMap) -> bool:
    """Whether the sum of blocks is the large model with weights of zero between the blocks (`one_wide_state`)."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{label(block)}.{name}": tensor
        + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for block, start in enumerate(method.starts)
        for name, tensor in start.items()
    }
    wide = one_wide_state(method, width_map, state)
    if wide is None:
        return False
    program = method.small.model.program
    with holding(model, wide) as whole, torch.no_grad():
        training = whole.training
        found = logits_of(whole.eval()(*program.args, **program.kwargs))
        whole.train(training)
        expected = loaded(method.whole, state).eval()(*program.args, **program.kwargs)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
