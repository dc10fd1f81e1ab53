"""Whether the sub-model that holds everything is the user's own model: outputs, gradients, buffers, other sizes.

Nothing of msfusion's own checks is used here: two modules are called side by side on inputs that neither has seen.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from architectures.entry import Architecture, Inputs, seed_everything
from msfusion.errors import MsfusionError
from msfusion.width.groups import WidthMap
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative to the largest value of a tensor; what rounding leaves is a hundredth of it or less."""

STEPS = 2
RATIO = 4


class Wrong(Exception):
    """The sub-model differs from the model without a word."""


class Crashed(Exception):
    """An exception that is no sentence of ours."""


def measure(architecture: Architecture) -> dict[str, Any]:
    """The row of one architecture."""
    row: dict[str, Any] = {
        "name": architecture.name,
        "kind": architecture.kind,
        "style": architecture.style,
        "verdict": "mapped",
        "words": "",
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure(architecture, row)
    except MsfusionError as error:
        row |= {"verdict": "refused", "words": str(error)}
    except Wrong as error:
        row |= {"verdict": "wrong", "words": str(error)}
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if not isinstance(error, Crashed) else str(error)
        row |= {"verdict": "crashed", "words": said}
    row["words"] = " ".join(row["words"].split())[:400]
    return row


def _measure(architecture: Architecture, row: dict[str, Any]) -> None:
    """Fill the row. Where dropout may be the difference, all is done again without it."""
    row["dropout"] = without_dropout(architecture.build())
    try:
        _compare(architecture, row, dropout=True)
    except Wrong:
        if not row["dropout"] or "shuffled" not in row:  # evaluation comes first, and draws nothing
            raise
        _compare(architecture, row, dropout=False)
        row["draws"] = "in another order"


def _compare(architecture: Architecture, row: dict[str, Any], dropout: bool) -> None:
    """Trace the model, cut it, and compare the sub-model that holds everything with a model of its own."""
    model, dtype, precision = _exact_model(architecture, dropout)
    reference = without_cache(_exact_model(architecture, dropout)[0])  # msfusion never sees it
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["precision"] = str(precision).removeprefix("torch.")
    inputs, before = _typed(architecture.example(1), dtype), _snapshot(model)
    width_map = _traced(architecture, model, inputs, row)
    changed = _changes(before, _snapshot(model))
    if changed:
        raise Wrong(f"tracing changed the model: {', '.join(changed)}")
    _small_sub_model(architecture, model, width_map, dtype, row)
    if is_meta(model):
        return
    pair = _Pair(architecture, reference, narrow(model, width_map, {}), dtype, TOLERANCES[precision])
    row["evaluation"] = pair.outputs(training=False, what="outputs in evaluation mode")
    row["other_sizes"] = pair.other_sizes()
    shuffled = {
        group.name: torch.randperm(group.units, generator=torch.Generator().manual_seed(number))
        for number, group in enumerate(width_map.groups)
    }
    other = _Pair(architecture, reference, narrow(model, width_map, shuffled), dtype, TOLERANCES[precision])
    row["shuffled"] = other.outputs(training=False, what="outputs with the units in another order")
    row["training"] = pair.outputs(training=True, what="outputs in training mode")
    row["gradients"], row["state"] = pair.steps()
    pair.outputs(training=False, what="outputs in evaluation mode after training")


def _traced(architecture: Architecture, model: nn.Module, inputs: Inputs, row: dict[str, Any]) -> WidthMap:
    """The width map, and what the row says of it; time is the processor's, as machines are busy."""
    more: dict[str, Any] = {"outputs": architecture.answer} if asks_for(architecture) else {}
    begin = time.process_time()
    width_map = trace(model, inputs, **more)
    row["trace_seconds"] = round(time.process_time() - begin, 2)
    row["groups"] = len(width_map.groups)
    row["reach"] = round(width_map.reach(), 4)
    row["unknown"] = dict(width_map.unknown)
    row["whole"] = whole(width_map)
    return width_map


def asks_for(architecture: Architecture) -> bool:
    """Whether one output is asked for, and `trace` can be asked."""
    return architecture.answer is not None and "outputs" in inspect.signature(trace).parameters


def whole(width_map: WidthMap) -> dict[str, float]:
    """Why parameters are kept whole: each reason with the share of all parameters, the largest first."""
    reasons: dict[tuple[str, int], str] = {(f.tensor, f.axis): f.reason for f in width_map.frozen}
    sizes = {name: torch.Size(width_map.shapes[name]).numel() for name in width_map.parameters}
    total, shares = sum(sizes.values()), Counter[str]()
    for name, size in sizes.items():
        if not width_map.places.get(name):
            said = {reasons[name, a] for a in range(len(width_map.shapes[name])) if (name, a) in reasons}
            shares["; ".join(sorted(said)) or "a single number"] += size
    return {reason: round(size / total, 4) for reason, size in shares.most_common(4)}


def _small_sub_model(
    architecture: Architecture, model: nn.Module, width_map: WidthMap, dtype: torch.dtype, row: dict[str, Any]
) -> None:
    """Hold a quarter of each group; that sub-model must train."""
    window = {g.name: torch.arange(-(-g.units // RATIO)) for g in width_map.groups}
    small = narrow(model, width_map, window).train()
    row["kept"] = round(sum(p.numel() for p in small.parameters()) / max(row["parameters"], 1), 4)
    if is_meta(model):
        return
    loss = loss_of(_call(small, _typed(architecture.example(2), dtype), "the sub-model of a quarter"))
    if loss.requires_grad:
        _own(loss.backward, "the sub-model of a quarter, backward")
    if not bool(loss.isfinite()):
        raise Wrong("the loss of the sub-model of a quarter is not finite")


def _exact_model(architecture: Architecture, dropout: bool) -> tuple[nn.Module, torch.dtype, torch.dtype]:
    """The model in training mode; the type of its inputs; and how precise what it computes is.

    That is float64 where the model runs in it, and float32 where any of its operators gives that.
    """

    def made() -> nn.Module:
        model = architecture.build().train()
        if not dropout:
            without_dropout(model)
        return model

    if is_meta(made()):
        return made(), torch.float32, torch.float32
    args, kwargs = _arguments(_typed(architecture.example(1), torch.float64))
    double = made().double()
    try:
        with _Types() as types, torch.no_grad():
            double(*args, **kwargs)
    except Exception:
        return made(), torch.float32, torch.float32
    if any(
        p.dtype is torch.float32 for p in double.parameters()
    ):  # a model that converts a part of itself back
        return made(), torch.float32, torch.float32
    return made().double(), torch.float64, torch.float32 if types.single else torch.float64


def is_meta(model: nn.Module) -> bool:
    """Whether a model has no values."""
    return any(parameter.is_meta for parameter in model.parameters())


class _Types(TorchDispatchMode):
    """Whether any operator gives a value in less than float64."""

    single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype in {
                torch.float32,
                torch.complex64,
                torch.bfloat16,
                torch.float16,
            }:
                self.single = True
        return result


class _Pair:
    """The user's model and the sub-model that should be the same."""

    def __init__(
        self,
        architecture: Architecture,
        model: nn.Module,
        sub: nn.Module,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        self.architecture, self.model, self.sub = architecture, model, sub
        self.dtype, self.tolerance = dtype, tolerance
        self.kept = set(state_of(model, persistent=True))  # before a call makes more

    def inputs(self, seed: int, **sizes: Any) -> Inputs:
        return _typed(self.architecture.example(seed, **sizes), self.dtype)

    def outputs(self, training: bool, what: str) -> float:
        """The largest difference of outputs over several seeds of the random numbers that the models draw."""
        worst = 0.0
        for seed in (3, 4):
            ours, theirs = self._twice(self.inputs(seed), seed, training, what)
            worst = max(worst, self._checked(theirs, ours, what))
        return worst

    def other_sizes(self) -> str:
        """Call both with other numbers of examples and other lengths, where the model takes them."""
        said: list[str] = []
        sizes = [(1, None), (5, None), *((2, length) for length in self.architecture.lengths)]
        for examples, length in sizes:
            inputs = self.inputs(6, examples=examples, length=length)
            name = f"{examples} examples" if length is None else f"length {length}"
            try:
                with torch.no_grad():
                    theirs = _plain_call(self.model.eval(), inputs, 6)
            except Exception:
                continue  # the model itself does not take them
            try:
                with torch.no_grad():
                    ours = _plain_call(self.sub.eval(), inputs, 6)
            except (TypeError, MsfusionError) as error:
                said.append(f"{name} refused: {' '.join(str(error).split())[:120]}")
                continue
            except Exception as error:
                raise Crashed(f"{name}: {type(error).__name__}: {error}") from error
            self._checked(theirs, ours, f"outputs for {name}")
        return "; ".join(said) or "equal"

    def steps(self) -> tuple[float, float]:
        """The largest differences of gradients and of the state over a few steps of training."""
        optimizers = [
            torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01)
            for module in (self.model, self.sub)
        ]
        gradients = state = 0.0
        for step in range(STEPS):
            ours, theirs = self._twice(self.inputs(7 + step), 7 + step, True, "a training step")
            losses = [loss_of(self._answer(theirs)), loss_of(ours)]
            for optimizer in optimizers:
                optimizer.zero_grad()
            if not losses[0].requires_grad:
                break
            losses[0].backward()  # type: ignore[no-untyped-call]
            _own(losses[1].backward, "backward")
            gradients = max(gradients, self._gradients())
            for optimizer in optimizers:
                optimizer.step()
            state = max(state, self._state())
        return gradients, state

    def _twice(self, inputs: Inputs, seed: int, training: bool, what: str) -> tuple[Any, Any]:
        """What sub-model and model answer; whatever they keep of it, both keep."""
        theirs = _plain_call(self.model.train(training), inputs, seed)
        seed_everything(seed)
        return _call(self.sub.train(training), inputs, what), theirs

    def _answer(self, output: Any) -> Any:
        """The part of an output that was asked for, where the map was told so."""
        names = self.architecture.answer
        if names is None or not asks_for(self.architecture):
            return output
        return [output[name] for name in ([names] if isinstance(names, (str, int)) else names)]

    def _checked(self, theirs: Any, ours: Any, what: str) -> float:
        first, second = tensors(self._answer(theirs)), tensors(ours)
        if len(first) != len(second):
            raise Wrong(f"{what}: {len(second)} tensors instead of {len(first)}")
        worst = 0.0
        for one, two in zip(first, second, strict=True):
            if one.shape != two.shape or one.dtype != two.dtype:
                raise Wrong(
                    f"{what}: {tuple(two.shape)} {two.dtype} instead of {tuple(one.shape)} {one.dtype}"
                )
            worst = max(worst, distance(one, two))
        return self._within(worst, what)

    def _within(self, error: float, what: str) -> float:
        if not error <= self.tolerance:
            raise Wrong(f"{what} differ by {error:.1e}")
        return float(f"{error:.1e}")

    def _gradients(self) -> float:
        ours, theirs = dict(self.sub.named_parameters()), dict(self.model.named_parameters())
        if missing := set(theirs) - set(dict(self.sub.named_parameters(remove_duplicate=False))):
            raise Wrong(f"parameters are missing: {', '.join(sorted(missing)[:3])}")
        flags = [n for n in theirs if n in ours and ours[n].requires_grad != theirs[n].requires_grad]
        if flags:
            raise Wrong(f"requires_grad differs: {', '.join(flags[:3])}")
        largest = max((float(_gradient(p).abs().max()) for p in theirs.values() if p.numel()), default=0.0)
        floor, worst = largest * torch.finfo(self.dtype).eps ** 0.5, 0.0
        if self.tolerance == TOLERANCES[torch.float32]:
            floor = largest * torch.finfo(torch.float32).eps ** 0.5
        for name, parameter in theirs.items():
            if name in ours:
                gradients = [_gradient(parameter), _gradient(ours[name])]
                self._within(distance(*gradients, floor=floor), f"gradients of {name}")
                worst = max(worst, distance(*gradients, floor=floor))
        return float(f"{worst:.1e}")

    def _state(self) -> float:
        """Parameters and buffers after a step; a buffer must need no gradient where the model's needs none."""
        ours, theirs = state_of(self.sub), state_of(self.model)
        if missing := self.kept - set(ours):
            raise Wrong(f"the sub-model misses {', '.join(sorted(missing)[:3])}")
        worst = 0.0
        for name in theirs.keys() & ours.keys():
            if ours[name].requires_grad and not theirs[name].requires_grad:
                raise Wrong(f"{name} requires a gradient after a step")
            if name not in self.kept and ours[name].shape != theirs[name].shape:
                continue  # a table that the model makes anew for a longer input
            worst = max(
                worst, self._within(distance(theirs[name], ours[name]), f"after a step, values of {name}")
            )
        return worst


def state_of(model: nn.Module, persistent: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by the names of their modules, a tied one under each; or what is saved of them."""
    state = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        if not persistent or leaf not in model.get_submodule(path)._non_persistent_buffers_set:
            state[name] = buffer
    return state


def _gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient; none is zero."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()


def _call(module: nn.Module, inputs: Inputs, what: str) -> Any:
    args, kwargs = _arguments(inputs)
    return _own(lambda: module(*args, **kwargs), what)


def _own(run: Callable[[], Any], what: str) -> Any:
    """Run what must not fail on the very sizes that were traced."""
    try:
        return run()
    except Exception as error:
        raise Crashed(f"{what}: {type(error).__name__}: {error}") from error


def _plain_call(module: nn.Module, inputs: Inputs, seed: int) -> Any:
    args, kwargs = _arguments(inputs)
    seed_everything(seed)
    return module(*args, **kwargs)


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; tensors are copies, as a model may write into them."""
    inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def _typed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs with their floating-point tensors in one type."""
    typed: Inputs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return typed


def without_dropout(model: nn.Module) -> bool:
    """Set each probability of dropping something to zero; whether any was not."""
    found = False
    for module in model.modules():
        names = [name for name in vars(module) if "drop" in name]
        names += ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        for holder in (module, getattr(module, "config", None)):
            for name in names if holder is module else list(getattr(holder, "__dict__", ())):
                value = getattr(holder, name, None)
                if isinstance(value, float) and value > 0 and (holder is module or "drop" in name):
                    setattr(holder, name, 0.0)
                    found = True
    return found


def without_cache(model: nn.Module) -> nn.Module:
    """A model of `transformers` that returns no cache: it serves generation, and `trace` switches it off, too."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    return model


def tensors(output: Any) -> list[Tensor]:
    """The tensors in whatever a model returns, in order; objects that are not nested containers are looked into."""
    return list(_tensors(output, 0))


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__):
        return  # as in `without_cache`; prefix tuning hands one in, and so gets it back
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, depth)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each, depth)
    elif hasattr(value, "__dict__") and depth < 4 and not isinstance(value, (type, torch.Size)):
        yield from _tensors(vars(value), depth + 1)


def distance(one: Tensor, two: Tensor, floor: float = 0.0) -> float:
    """The largest difference of two tensors, relative to the largest value of the first; infinities must agree."""
    one, two = _plain(one), _plain(two)
    if one.shape != two.shape or not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    one, two = one.nan_to_num(0.0, 0.0, 0.0), two.nan_to_num(0.0, 0.0, 0.0)
    if not one.numel():
        return 0.0
    return float((one - two).abs().max()) / max(float(one.abs().max()), floor, 1e-30)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def loss_of(output: Any) -> Tensor:
    """A number that depends on each entry of each floating-point output, on each differently."""
    total = torch.zeros(())
    for tensor in tensors(output):
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point() and tensor.numel():
            flat = tensor.nan_to_num(0.0, 0.0, 0.0).reshape(-1)
            flat = flat / (1 + flat.detach().abs().max())
            weights = torch.cos(torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device))
            total = total + (weights * (flat + flat**2)).sum()
    return total


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that tracing must leave alone."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name} mode"] = module.training
        seen[f"{name} hooks"] = sum(
            len(value)
            for key, value in vars(module).items()
            if key.endswith("_hooks") and hasattr(value, "__len__")
        )
        seen[f"{name} attributes"] = sorted(vars(module))
        for key, value in {**module._parameters, **module._buffers}.items():
            seen[f"{name}.{key}"] = (
                value
                if value is None
                else (value, type(value), None if value.is_meta else value.detach().clone())
            )
    return seen


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs between two snapshots."""

    def same(one: Any, two: Any) -> bool:
        if not isinstance(one, tuple) or not isinstance(two, tuple):
            return bool(one == two) if not isinstance(one, tuple) and not isinstance(two, tuple) else False
        if one[0] is not two[0] or one[1] is not two[1]:
            return False
        return (
            one[2] is None
            or two[2] is None
            or bool(torch.equal(one[2], two[2]) or distance(one[2], two[2]) == 0)
        )

    names = [*before, *(name for name in after if name not in before)]
    return [
        name
        for name in names
        if name not in before or name not in after or not same(before[name], after[name])
    ][:5]
