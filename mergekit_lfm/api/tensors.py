"""Tensors in memory merged by a method, through the same code as a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any
from warnings import warn

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Unit, Value
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.foreign import unknown_method
from mergekit_lfm.recipe.parts import Settings
from mergekit_lfm.recipe.values import find_rule, read_setting, value_of

if TYPE_CHECKING:
    import torch


def merge_tensors(
    method: str,
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    statistics: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
    name: str = "tensor",
    **parameters: Any,
) -> torch.Tensor:
    """One tensor merged by a method, in memory, through the same reduce, solve and apply as a checkpoint's.

    tensors: the method's inputs, of one shape; base: the base model's, where the method takes one. statistics: for
    `fisher` the diagonal Fisher information of each input, of its shape; for `regmean` the Gram matrix of each,
    [inputs, inputs], and the tensors are matrices [outputs, inputs], with the bias as their last column if the Gram
    matrix is of inputs with a 1 appended. A parameter that is given for each input is a number for all or a list with
    one for each. `lambda` is passed as `lambda_`. The result has the promoted dtype of the inputs, and lies on their
    GPU if all are on the same, else in the processor's memory. seed and name key the random numbers, as a recipe's seed
    and the tensor's name do.
    """
    declared = find_method(method)
    if base is not None and declared.base in ("first", "member"):
        tensors, base = [base, *tensors], None
    shared, inputs = _values(declared, name, len(tensors), parameters)
    _check_tensors(declared, tensors, base)
    evidence = _check_statistics(declared, tensors, statistics)
    return merge_checked(declared, name, Settings(shared, inputs), tensors, base, evidence, seed)


def find_method(name: str) -> Method:
    """The merge method of this name. Raises PlanError for an unknown one."""
    if not isinstance(name, str) or name not in METHODS:
        sentence, words = unknown_method(str(name), METHODS)
        raise PlanError(sentence, **words)
    return METHODS[name]


def merge_checked(
    method: Method,
    name: str,
    settings: Settings,
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    evidence: Sequence[torch.Tensor],
    seed: int,
) -> torch.Tensor:
    """The merge of tensors that fit together. settings: of the tensor `name`. evidence: statistics, one for each."""
    import torch

    dtype = tensors[0].dtype
    for tensor in (*tensors[1:], *([] if base is None else [base])):
        dtype = torch.promote_types(dtype, tensor.dtype)
    norms = tuple(float(x.double().norm()) for x in evidence)
    unit = unit_of(name, settings, tuple(tensors[0].shape), seed, double=dtype == torch.float64, norms=norms)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would add the parts of a sum in another order
    try:
        return _merged(method, unit, tensors, base, evidence, dtype)
    finally:
        torch.set_num_threads(threads)


def unit_of(
    name: str,
    settings: Settings,
    shape: tuple[int, ...],
    seed: int,
    *,
    double: bool = False,
    norms: tuple[float, ...] = (),
) -> Unit:
    """The unit of the tensor `name` alone. double, norms: as of `Unit`."""
    from mergekit_lfm.kernels.random import key

    keys = tuple(key(seed, name, position) for position in range(len(settings.inputs)))
    return Unit(name, shape, prod(shape), settings.shared, settings.inputs, keys, double, norms=norms)


def _merged(
    method: Method,
    unit: Unit,
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    statistics: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    import torch

    from mergekit_lfm.engine.blocks import Blocks, default_device, merge_blocks
    from mergekit_lfm.engine.matrices import InMemoryMatrices
    from mergekit_lfm.kernels.gpu import make_kernels
    from mergekit_lfm.kernels.sums import round_once
    from mergekit_lfm.machine.accelerators import accelerator_of
    from mergekit_lfm.machine.devices import can_merge_on
    from mergekit_lfm.plan.job import block_numel

    first, *others = {x.device for x in (*tensors, *statistics, *([] if base is None else [base]))}
    device = torch.device("cpu") if others or not can_merge_on(first) else first
    shape = None if method.whole is None or not unit.numel else method.whole.view(unit)
    if method.whole is not None and shape is not None:
        matrices = InMemoryMatrices(
            [x.detach().to(device).reshape(shape) for x in tensors],
            [x.detach().to(device) for x in statistics],
            None if base is None else base.detach().to(device).reshape(shape),
        )
        with default_device(device):
            (matrix,) = method.whole.merge(unit, [matrices])
        return round_once(matrix, dtype).reshape(unit.shape)
    if method.copies(unit):
        tensors, base = tensors[:1], None
    on_host = device.type == "cpu"
    accelerator = accelerator_of(None if on_host else device)
    kernels = make_kernels(accelerator, "never" if on_host else "auto", [unit.numel], threads=1)
    for problem in sorted(kernels.problems):
        warn(problem, stacklevel=4)
    blocks = Blocks(
        sources=[_reader(x, device) for x in (*tensors, *statistics)],
        base=None if base is None else _reader(base, device),
        numel=unit.numel,
        block=block_numel(method, unit),
        dtype=torch.float64 if unit.double else torch.float32,
        run=kernels,
        accelerator=accelerator,
        at_once=accelerator.resident_chunk if kernels.native else accelerator.chunk,
    )
    return merge_blocks(method, unit, blocks, dtype).reshape(unit.shape)


def _reader(tensor: torch.Tensor, device: torch.device) -> Callable[[int, int], torch.Tensor]:
    flat = tensor.detach().to(device).reshape(-1)
    return lambda start, stop: flat[start:stop]


def _check_statistics(
    method: Method, tensors: Sequence[torch.Tensor], statistics: Sequence[torch.Tensor] | None
) -> Sequence[torch.Tensor]:
    """The statistics, one for each tensor, () for a method that takes none."""
    if method.statistics is None:
        if statistics is not None:
            raise PlanError(f"{method.name} takes no statistics; leave them out")
        return ()
    shape = tuple(tensors[0].shape)
    if method.whole is not None:
        if len(shape) != 2:
            raise PlanError(f"{method.name} merges matrices [outputs, inputs], found a tensor {list(shape)}")
        shape = (shape[1], shape[1])
    statistics = [] if statistics is None else list(statistics)
    shapes = [list(x.shape) for x in statistics]
    if shapes != [list(shape)] * len(tensors):
        raise PlanError(
            f"{method.name} needs statistics={method.statistics} of each input, {len(tensors)} tensors "
            f"{list(shape)}; found {shapes or 'none'}"
        )
    squares = [x.diagonal() if method.whole else x for x in statistics]
    if not all(bool(x.isfinite().all()) for x in statistics) or any(bool((x < 0).any()) for x in squares):
        raise PlanError(f"{method.name}: the statistics are NaN, infinite or negative; expected means of squares")
    return statistics


def _values(
    method: Method, tensor: str, count: int, options: Mapping[str, Any]
) -> tuple[dict[str, Value], tuple[dict[str, Value], ...]]:
    """The method's parameters for one tensor: those all inputs share, and one mapping per input."""
    options = {"lambda" if name == "lambda_" else name: value for name, value in options.items()}
    known = {parameter.name: parameter for parameter in method.parameters}
    for name in options.keys() - known.keys():
        raise PlanError(f"{method.name} has no parameter {name!r}, {did_you_mean(name, known)}")
    shared: dict[str, Value] = {}
    inputs: tuple[dict[str, Value], ...] = tuple({} for _ in range(count))
    for parameter in method.parameters:
        value = options.get(parameter.name, parameter.default)
        if value is REQUIRED:
            raise PlanError(f"{method.name} needs the parameter {parameter.name!r}: {parameter.doc}")
        if not parameter.per_input:
            shared[parameter.name] = _value(parameter, value, tensor)
            continue
        each = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
        if len(each) != count:
            raise PlanError(f"{parameter.name}: found {len(each)} values, expected one for each of {count} tensors")
        for values, one in zip(inputs, each, strict=True):
            values[parameter.name] = _value(parameter, one, tensor)
    return shared, inputs


def _value(parameter: Parameter, value: Any, tensor: str) -> Value:
    try:
        rule = find_rule(read_setting(value, parameter), tensor)
    except ValueError as error:
        raise PlanError(f"{parameter.name}{error}") from None
    return None if rule is None else value_of(rule, parameter, None)


def _check_tensors(method: Method, tensors: Sequence[torch.Tensor], base: torch.Tensor | None) -> None:
    least, most = method.inputs
    if len(tensors) < least or (most is not None and len(tensors) > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise PlanError(f"{method.name} merges {wanted} tensors, found {len(tensors)}")
    if base is None and method.base == "required":
        raise PlanError(f"{method.name} needs a base: pass base=tensor")
    for tensor in (*tensors, *([] if base is None else [base])):
        if tensor.shape != tensors[0].shape or not tensor.is_floating_point():
            raise PlanError(
                f"found {list(tensor.shape)} {tensor.dtype}, expected floating tensors {list(tensors[0].shape)}"
            )
