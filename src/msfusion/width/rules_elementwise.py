"""Rules for operators that keep their input's axes: element by element, along one axis, or a reduction of some."""

from __future__ import annotations

from torch import Tensor, fx

from msfusion.width.analysis import Analysis, Outcome, has_tensor, operator_name, rule, shape_of
from msfusion.width.axes import Axes, Axis, cut_at, freeze, fresh, unify


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a node, with repetitions, None left out."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return [n for n in found if isinstance(n.meta.get("val"), Tensor)]


@rule(
    "pointwise", "copy", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "fill", "zero", "floor_divide",
    "__and__", "__or__", "__xor__", "multiply", "subtract", "divide", "true_divide", "negative", "absolute",
    "greater", "greater_equal", "less", "less_equal", "not_equal", "clip", "fix",
    "complex", "polar",
)  # fmt: skip
def pointwise(analysis: Analysis, node: fx.Node) -> Outcome:
    """Element by element with broadcasting."""
    return analysis.broadcast([analysis.axes(n) for n in tensors_of(node)])


@rule("broadcast_tensors")
def broadcast_tensors(analysis: Analysis, node: fx.Node) -> Outcome:
    """Each tensor with the axes of all."""
    shared = analysis.broadcast([analysis.axes(n) for n in tensors_of(node)])
    return [list(shared) for _ in node.meta["val"]]


@rule(
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout", "bernoulli",
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "to", "_to_copy", "type_as",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "uniform", "exponential", "log_normal", "cauchy", "geometric", "random", "poisson",
    "relu6", "hardtanh", "prelu_unary", "rrelu", "selu", "celu", "elu", "silu", "mish", "hardswish", "hardsigmoid",
    "gelu", "leaky_relu", "softplus", "log_sigmoid", "hardshrink", "softshrink", "threshold", "square", "float_power",
    "isnan", "isinf", "isfinite", "requires_grad", "resolve_conj", "resolve_neg", "real", "imag", "conj", "_conj",
)  # fmt: skip
def unary(analysis: Analysis, node: fx.Node) -> Outcome:
    """The output has the axes of the first argument. Only a copy or cast is still the same tensor of the state."""
    axes = analysis.axes(node.args[0])
    if operator_name(node) not in {"to", "_to_copy", "contiguous", "clone", "alias"}:
        axes = [Axis(axis.terms) for axis in axes]
    outputs = node.meta["val"]
    return [axes for _ in outputs] if isinstance(outputs, (tuple, list)) else axes


def dimensions(analysis: Analysis, node: fx.Node, name: str = "dim", rank: int | None = None) -> list[int]:
    """An argument of one or more axes, as non-negative numbers; all axes where none is given."""
    rank = len(analysis.axes(node.args[0])) if rank is None else rank
    given = analysis.argument(node, name)
    if given is None or given == []:
        return list(range(rank))
    return [d % rank if rank else 0 for d in ([given] if isinstance(given, int) else given)]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
      "sort", "argsort", "flip", "topk", "kthvalue", "roll", "diff", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft",
      "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn",
      "fft_rfftn", "fft_irfftn", "fft_fftshift", "fft_ifftshift")  # fmt: skip
def along_axis(analysis: Analysis, node: fx.Node) -> Outcome:
    """The values depend on all units of an axis, or on their order: it cannot be narrowed."""
    axes = list(analysis.axes(node.args[0]))
    name = operator_name(node)
    for d in dimensions(analysis, node, "dims" if name in {"flip", "roll"} else "dim"):
        freeze(axes[d], f"{name} along this axis")
    values = node.meta["val"]
    outputs = list(values) if isinstance(values, (tuple, list)) else [values]
    kept: list[Axes] = []
    for value in outputs:
        sizes = shape_of(value)
        kept.append([
            fresh(size, f"{name} along this axis") if size != axis.size else Axis(axis.terms)
            for axis, size in zip(axes, sizes, strict=True)
        ])  # fmt: skip
    return kept if isinstance(values, (tuple, list)) else kept[0]


@rule("sum", "mean", "nanmean", "nansum", "amax", "amin", "aminmax", "max", "min", "var", "std", "var_mean", "std_mean",
      "all", "any", "argmax", "argmin", "prod", "logsumexp", "median", "mode", "count_nonzero")  # fmt: skip
def reduction(analysis: Analysis, node: fx.Node) -> Outcome:
    """Some axes are reduced. A mean needs no care; a sum is scaled; what depends on order or on K is frozen."""
    name = operator_name(node)
    if name in {"max", "min"} and isinstance(analysis.argument(node, "other"), fx.Node):
        return pointwise(analysis, node)
    axes = analysis.axes(node.args[0])
    reduced = dimensions(analysis, node)
    ordered = (
        has_tensor(node.meta["val"])
        and isinstance(node.meta["val"], (tuple, list))
        and name in {"max", "min"}
        and any(user.args[1] == 1 for user in node.users)  # where the largest one was is asked for, too
    )
    for d in reduced:
        if name in {"argmax", "argmin", "prod", "logsumexp", "median", "mode", "count_nonzero"} or ordered:
            freeze(axes[d], f"{name} over this axis")
        else:
            analysis.contract(node, tensors_of(node)[0], d, power=1.0 if name in {"sum", "nansum"} else 0.0)
    return reduced_axes(analysis, node, reduced)


def reduced_axes(analysis: Analysis, node: fx.Node, reduced: list[int]) -> Outcome:
    """What is left of the first argument's axes; of size 1 where they are kept."""
    axes, keep = analysis.axes(node.args[0]), analysis.argument(node, "keepdim", False)
    left = [
        Axis(((),)) if d in reduced else Axis(a.terms) for d, a in enumerate(axes) if keep or d not in reduced
    ]
    values = node.meta["val"]
    return [left for _ in values] if isinstance(values, (tuple, list)) else left


@rule("glu")
def glu(analysis: Analysis, node: fx.Node) -> Outcome:
    """The first half of an axis times the sigmoid of the second."""
    axes = list(analysis.axes(node.args[0]))
    d = dimensions(analysis, node)[0]
    halves = cut_at(axes[d], [axes[d].size // 2])
    if halves is None:
        return None
    unify(halves[0], halves[1])
    axes[d] = halves[0]
    return axes


@rule("normal")
def normal(analysis: Analysis, node: fx.Node) -> Outcome:
    """Random numbers around a mean and with a spread, each a tensor or one number."""
    tensors = [analysis.axes(n) for n in tensors_of(node)]
    return analysis.broadcast(tensors) if tensors else constant(analysis, node)


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
    "randint",
)
def constant(analysis: Analysis, node: fx.Node) -> Outcome:
    """Equal (or identically distributed) values everywhere: any width will do."""
    return [fresh(size, weak=True) for size in analysis.shape(node)]


@rule("eye")
def eye(analysis: Analysis, node: fx.Node) -> Outcome:
    """The identity matrix: in any order of its rows it is the same, where its columns are in that order too."""
    rows, columns = analysis.shape(node)
    if rows != columns:
        return analysis.frozen(node, "made by counting")
    both = fresh(rows, weak=True)
    return [both, Axis(both.terms)]


@rule("arange", "linspace", "scalar_tensor", "tril_indices", "triu_indices", "randperm", "one_hot")
def counted(analysis: Analysis, node: fx.Node) -> Outcome:
    """Values that depend on the position: never narrowed."""
    if operator_name(node).startswith("one_hot"):
        *_, last = analysis.shape(node)
        return [*analysis.axes(node.args[0]), fresh(last, "a one-hot code")]
    return analysis.frozen(node, "made by counting")


@rule("histc", "bincount", "nonzero", "unique", "_unique2", "unique_consecutive", "unique_dim", "searchsorted",
      "bucketize", "isin")  # fmt: skip
def found_by_value(analysis: Analysis, node: fx.Node) -> Outcome:
    """What is counted or found depends on all values: nothing of the arguments can be narrowed."""
    name = operator_name(node)
    for tensor in tensors_of(node):
        for axis in analysis.axes(tensor):
            freeze(axis, f"{name} over its values")
    return analysis.frozen(node, f"made by {name}")


@rule("tril", "triu")
def triangle(analysis: Analysis, node: fx.Node) -> Outcome:
    """The last two axes are compared by position."""
    axes = analysis.axes(node.args[0])
    for axis in axes[-2:]:
        freeze(axis, "cut to a triangle")
    return [Axis(axis.terms) for axis in axes]
