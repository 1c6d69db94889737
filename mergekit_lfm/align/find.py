"""Align one model to another: check the request, find the transform, record how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.align.choices import shorten
from mergekit_lfm.align.correlations import MomentsSource, open_moments
from mergekit_lfm.align.gains import new_gains
from mergekit_lfm.align.pair import Pair, Side, one_thread_each
from mergekit_lfm.align.request import Aligner, AlignProblem, AlignResult
from mergekit_lfm.arch.pairs import check_alike
from mergekit_lfm.arch.registry import find_symmetries
from mergekit_lfm.arch.table import Symmetries
from mergekit_lfm.artifacts.transform import Transform, TransformInfo
from mergekit_lfm.errors import PlanError, did_you_mean, reason
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.recipe.align import align_options
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.hub import display_name
from mergekit_lfm.store.identity import content_of
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.version import __version__
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.maps import CPU

ModelSource = str | os.PathLike[str] | Checkpoint | Mapping[str, Tensor]


def find_transform(
    source: ModelSource,
    to: ModelSource,
    method: str = "weight_matching",
    *,
    symmetries: Symmetries | None = None,
    symmetries_to: Symmetries | None = None,
    initial: Transform | None = None,
    order: Iterable[str] | Iterable[Iterable[str]] | None = None,
    statistics: MomentsSource | None = None,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
    **parameters: Any,
) -> Transform:
    """The transform that brings `source` near `to`, by one of `ALIGN_METHODS` with its parameters.

    source, to: checkpoints, their folders, or tensors by name. symmetries: the table of both; by default found from
    the config, so tensors need it. symmetries_to: the table of `to` if the widths of its hidden layers differ, for
    "ot". initial: a transform under the same table to start from. order: the names of the groups that a sweep visits,
    in its order, or one such list for each sweep; by default all groups, in random orders by the seed, for "ot" from
    the input on. With statistics each group is found by itself, and neither matters; of `initial` "ot" uses only the
    elements of heads, and keeps them.
    statistics: a file of cross moments of both models, in either order, or {weight: (cross [m + 1, n + 1], mean squares
    [m + 1], mean squares [n + 1])} of a layer's inputs and a 1, those of `to` first. progress is called with 1 after
    each visit of a group. device: where tensors are multiplied, matrices factored and Sinkhorn's iteration runs:
    "cpu", "cuda", "cuda:1", "auto". Assignments, exact transport, and the matrices inside heads are found on the CPU,
    where the transform lies.

    The facts of the transform hold all options that mattered, and as scores the sum of <A, B> over all tensors and
    |A - B|^2, before and after ("before" only if the shapes are the same). The same inputs give the same transform for
    any number of threads; a GPU's agrees with the CPU's within rounding, and permutes alike unless scores tie within
    that. Gains of norms on rotated groups become those of `to`, see `new_gains`. Raises PlanError for impossible
    requests and if products overflow, FormatError for NaN or infinity in a model or the statistics.
    """
    target = _find_device(device)
    options = align_options(method, parameters, statistics=statistics is not None)
    aligner: Aligner = ALIGN_METHODS[method]
    sides = _side(source, "the source"), _side(to, "the model to align to")
    first = _table(sides[0], symmetries)
    tables = first, symmetries_to or (symmetries or _table(sides[1], None))
    check_alike((sides[0].specs, sides[1].specs), tables, (sides[0].label, sides[1].label), widths=aligner.widths)
    listed = None if order is None else _as_lists(order)
    visits = None if listed is None else _order(listed, first, int(options.get("sweeps") or 1))
    if initial is not None and initial.symmetries != first:
        raise PlanError("`initial` is under another table than the source; start from a transform under the same table")
    with torch.no_grad(), _report_full_memory(target), one_thread_each(target) as in_order:
        pair = Pair(*sides, *tables, in_order, device=target)
        moments = None if statistics is None else open_moments(statistics, pair, lambda: _contents(sides))
        aligned = aligner.find(AlignProblem(pair, options, initial, visits, moments, progress or (lambda _: None)))
        started = {"order": listed, "initial": initial.info.method if initial else None}
        used = {name: value for name, value in started.items() if value is not None and name in aligned.heeded}
        if target != CPU:
            used["device"] = target.type
        return _make_transform(aligned, method, {**options, **used}, sides)


def find_differences(
    facts: TransformInfo,
    source: Checkpoint,
    to: Checkpoint,
    method: str,
    parameters: Mapping[str, Any],
    *,
    statistics: bool = False,
    initial: bool = False,
    order: Iterable[str] | Iterable[Iterable[str]] | None = None,
    device: str = "cpu",
) -> list[str]:
    """The parts of a transform's facts (models, method, options, versions) that do not fit a call of `find_transform`.

    statistics, initial: whether the call has them; the facts do not record their content.
    """
    target = find_gpu(device)
    options: dict[str, Any] = align_options(method, parameters, statistics=statistics)
    options |= {} if order is None or statistics else {"order": _as_lists(order)}
    options |= {} if target is None else {"device": target.type}
    known = {name: value for name, value in facts.options.items() if not (initial and name == "initial")}
    compared = {
        "models": facts.models == (source.content, to.content),
        "method": facts.method == method,
        "options": known == options,
        "versions": facts.versions == _versions(),
    }
    return [name for name, same in compared.items() if not same]


def _find_device(device: str) -> torch.device:
    """The device for products. Raises PlanError if it is missing, or if torch would multiply float32 as TF32 on it."""
    target = find_gpu(device)
    if target is None:
        return CPU
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where reading the older flag may raise
    if precision == "tf32" if precision is not None else matmul.allow_tf32:
        raise PlanError(
            "torch is set to multiply float32 matrices as TF32, which has 11 bits; expected all 24, because alignments "
            'compare sums of products. Call torch.set_float32_matmul_precision("highest"), or unset the variable '
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
        )
    return target


@contextmanager
def _report_full_memory(target: torch.device) -> Iterator[None]:
    """Turn torch's error about a full GPU into a PlanError, and free the GPU's memory afterwards."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"the memory of {target} is full ({reason(error)}); expected room for some tensors of both models in "
            "float64, and for the squares of the groups' sizes. Align on the CPU, or on a larger GPU"
        ) from None
    finally:
        torch.cuda.empty_cache()  # does nothing if no GPU was used


def _side(model: ModelSource, label: str) -> Side:
    """Open a model. label: the name of a model given as tensors."""
    if isinstance(model, str | os.PathLike):
        model = open_model(model)
    if isinstance(model, Checkpoint):
        return Side(display_name(model.path), model, model)
    specs = {n: TensorSpec(n, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for n, x in model.items()}
    return Side(label, specs, model)


def _table(side: Side, symmetries: Symmetries | None) -> Symmetries:
    if symmetries is not None:
        return symmetries
    if isinstance(side.tensors, Checkpoint):
        return find_symmetries(side.tensors)
    raise PlanError(
        f"{side.label} is given as tensors, which do not name their architecture; give its table (`symmetries=`)"
    )


def _as_lists(order: Iterable[str] | Iterable[Iterable[str]]) -> list[Any]:
    """An order as lists, which can be read more than once. Raises PlanError if it is not iterable."""
    if not isinstance(order, Iterable):
        raise PlanError(f"order: found {order!r}, expected names of groups, or a list of names for each sweep")
    names = [order] if isinstance(order, str) else order
    return [list(x) if isinstance(x, Iterable) and not isinstance(x, str) else x for x in names]


def _order(order: list[Any], table: Symmetries, most: int) -> list[list[str]]:
    """The visits of each sweep. Raises PlanError for names that are not groups."""
    sweeps = [names if isinstance(names, list) else [names] for names in order]
    if not any(isinstance(names, list) for names in order):
        sweeps = [order] * most if order else []
    unknown = sorted({str(x) for names in sweeps for x in names if not isinstance(x, str) or x not in table.groups})
    if unknown or not sweeps or not all(sweeps):
        wrong = f"{unknown[0]!r}, {did_you_mean(unknown[0], table.groups)}" if unknown else "a sweep without groups"
        raise PlanError(f"order: found {wrong}; expected names of groups in the table")
    return sweeps


def _contents(sides: tuple[Side, Side]) -> tuple[str, str]:
    return _content(sides[0]), _content(sides[1])


def _content(side: Side) -> str:
    """The digest by which statistics identify a model."""
    return side.tensors.content if isinstance(side.tensors, Checkpoint) else content_of(side.tensors)


def _make_transform(
    aligned: AlignResult, method: str, options: Mapping[str, Any], sides: tuple[Side, Side]
) -> Transform:
    """The transform with its facts: the options, and how near it brings the models."""
    pair = aligned.pair
    scores: dict[str, float] = {}
    untouched = Transform(pair.symmetries, {}, TransformInfo(method))
    same = all(side.shape == pair.to.specs[name].shape for name, side in pair.source.specs.items())
    for when, elements in (("before", {}), ("after", aligned.elements)) if same else (("after", aligned.elements),):
        moved = untouched if not elements else Transform(pair.symmetries, elements, TransformInfo(method))
        scores[f"inner_{when}"], scores[f"distance_{when}"] = pair.closeness(moved)
    kept = {name: short for name, element in aligned.elements.items() if (short := shorten(element)) is not None}
    checkpoints = all(isinstance(side.tensors, Checkpoint) for side in sides)
    facts = TransformInfo(
        method,
        aligned.exact,
        _contents(sides) if checkpoints else (),
        dict(options),
        scores,
        _versions(),
    )
    return Transform(pair.symmetries, kept, facts, new_gains(aligned))


def _versions() -> dict[str, str]:
    """The versions that a transform's numbers depend on."""
    own = {"mergekit_lfm": __version__, "torch": torch.__version__}
    return own | {name: version(name) for name in ("numpy", "scipy", "pot")}
