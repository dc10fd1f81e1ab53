"""Rules for normalisation, pooling and resizing: channels pass, statistics stand beside their channels."""

from __future__ import annotations

import re

from torch import fx

from msfusion.width.analysis import Analysis, Contraction, Outcome, operator_name, rule, shape_of
from msfusion.width.axes import Axes, Axis, freeze, fresh, unify
from msfusion.width.views import split


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm", "cudnn_batch_norm")
def batch_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """Each channel on its own; weight, bias and running statistics stand along the channels."""
    x = analysis.axes(node.args[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = analysis.argument(node, name)
        if tensor is not None:
            unify(x[1], analysis.axes(tensor)[0])
    return [Axis(a.terms) for a in x]


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """The last axes together; weight and bias stand along them. A narrowed axis is normalised over what it has."""
    x = [Axis(a.terms) for a in analysis.axes(node.args[0])]
    for name in ("weight", "bias"):
        tensor = analysis.argument(node, name)
        if tensor is not None:
            analysis.broadcast([x, analysis.axes(tensor)])
    analysis.touched += x[len(x) - len(analysis.argument(node, "normalized_shape")) :]
    return x


@rule("group_norm")
def group_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """Narrowed by whole norm groups, unless there is only one (then it is a layer norm)."""
    x: Axes = [Axis(a.terms) for a in analysis.axes(node.args[0])]
    groups = analysis.argument(node, "num_groups")
    if groups > 1:
        parts = split(x[1].terms, [groups, x[1].size // groups])
        if parts is None:
            return None
        freeze(parts[1], "inside one group of a group norm")
        analysis.counted[node] = parts[0]
    for name in ("weight", "bias"):
        tensor = analysis.argument(node, name)
        if tensor is not None:
            unify(x[1], analysis.axes(tensor)[0])
    return x


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_nearest3d", "upsample_trilinear3d",
      "_upsample_nearest_exact2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "grid_sampler")  # fmt: skip
def pooling(analysis: Analysis, node: fx.Node) -> Outcome:
    """Batch and channels pass, space is resized."""
    x = analysis.axes(node.args[0])
    name = operator_name(node)
    counted = re.search(r"(\d)d", name)
    spatial = int(counted.group(1)) if counted else len(x) - 2
    for axis in x[len(x) - spatial :]:
        freeze(axis, "space under pooling or resizing")
    kept = [Axis(a.terms) for a in x[: len(x) - spatial]]

    def output(sizes: list[int]) -> Axes:
        return [*kept, *(fresh(size, "space") for size in sizes[len(kept) :])]

    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [output(shape_of(value)) for value in values]
    return output(analysis.shape(node))


@rule("prelu")
def prelu(analysis: Analysis, node: fx.Node) -> Outcome:
    """One slope for all, or one per channel."""
    x = [Axis(a.terms) for a in analysis.axes(node.args[0])]
    slope = analysis.axes(node.args[1])[0]
    if slope.size > 1:
        unify(x[1], slope)
    return x


@rule("_weight_norm")
def weight_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """G * v / |v|, the norm over all axes but one: |v| of w of K units is (w/K)**0.5 of the whole one's."""
    direction, gain = analysis.argument(node, "v"), analysis.argument(node, "g")
    v = analysis.axes(direction)
    kept = analysis.argument(node, "dim", 0) % len(v)
    for d in range(len(v)):
        if d != kept and analysis.axes(gain)[d].size == 1:
            analysis.touched.append(v[d])
            analysis.contractions.setdefault(node, []).append(Contraction(gain, d, v[d], -0.5))
    return analysis.broadcast([v, analysis.axes(gain)])
