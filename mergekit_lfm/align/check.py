"""Check a symmetry table against the model that it describes.

Three questions: do random elements of every group keep the outputs; does every axis that the table names have to be
named; and do larger families change the outputs, so that the table is complete. The weights first get noise, so that
equal values (gains of 1, biases of 0) hide no mistakes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mergekit_lfm.align.elements import ELEMENT_KINDS, ElementKind, elements_of, random_transform
from mergekit_lfm.align.larger import LARGER, ModelTensors, Place, places_of, replace_parts
from mergekit_lfm.arch.table import Group, Heads, Part, Symmetries, Units, check_fit, part_size
from mergekit_lfm.artifacts.transform import Transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.rewritten import rewrite

Forward = Callable[[Mapping[str, Tensor]], Tensor]

# Outputs that differ by no more than this count as unchanged, by the dtype of the tensors. In float64 the remaining
# difference comes from norms, rotary positions and softmax, which transformers computes in float32 even then.
UNCHANGED = {torch.float64: 1e-5, torch.float32: 3e-4}
CHANGED = 1e-3  # outputs that differ by more count as changed
NOISE = 0.3  # of vectors, relative to their own size


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One finding. part: "kept" (a family of the table), "needed" (an axis left out), "enough" (a larger family).

    what: the groups and the kind of element, or the tensors and the axis, with layer numbers replaced by "*".
    difference: between outputs, max |y' - y| / max |y - mean of y over the examples|; inf if they are not finite.
    reason: why the outputs cannot change, if they do not depend on the transformed entries.
    """

    part: Literal["kept", "needed", "enough"]
    what: str
    difference: float
    expected: Literal["unchanged", "changed"]
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings. unchanged: outputs with at most this difference count as the same."""

    rows: tuple[CheckRow, ...]
    unchanged: float

    @property
    def ok(self) -> bool:
        """True if every finding is as expected."""
        return all(row.ok for row in self.rows)


@dataclass(frozen=True)
class _Trial:
    """A row before its measurement: the transform whose outputs are compared, and the places that it changes."""

    part: Literal["kept", "needed", "enough"]
    what: str
    transform: Callable[[torch.Generator], Transform]
    places: Sequence[Place] = ()


def check_symmetries(
    tensors: Mapping[str, Tensor],
    symmetries: Symmetries,
    run: Forward,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Test every claim of the table on the model.

    run: returns the outputs [..., n] of the model with the given tensors, for several inputs; all its outputs, in the
    dtype of the tensors, with dropout off and BatchNorm in evaluation mode. float64 tensors stay float64, others become
    float32. progress is called with the number of finished trials and of all. The same seed gives the same report.
    Raises PlanError if the table does not fit the tensors, or if the outputs do not depend on the inputs.
    """
    specs = {n: TensorSpec(n, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for n, x in tensors.items()}
    check_fit(symmetries, specs, "the model")
    draw = torch.Generator().manual_seed(seed)
    model = ModelTensors({name: _add_noise(x, draw) for name, x in tensors.items()}, symmetries)
    judge = _Judge(model, random_transform(model.tensors, symmetries, seed=seed), run)
    trials = [*_family_trials(model), *_axis_trials(judge.whole), *_larger_trials(model)]
    rows = []
    for i, trial in enumerate(trials):
        rows.append(judge.row(trial, draw.manual_seed(seed + i)))
        if progress:
            progress(i + 1, len(trials))
    return Report(tuple(rows), judge.unchanged)


def _add_noise(x: Tensor, draw: torch.Generator) -> Tensor:
    """Add seeded noise to the tensor, in float32 or float64. A vector gets noise relative to its own size, and stays
    positive if it was. A matrix gets it only if it is small, as before training, when flat attention hides mistakes.
    """
    if not x.is_floating_point() or x.ndim == 0:
        return x
    noise = torch.randn(x.shape, dtype=torch.float64, generator=draw)
    y = x.double()
    size = float(y.square().mean().sqrt())
    if x.ndim > 1:
        enough = min(x.shape[:2]) / x.numel()  # a variance that keeps the size of vectors, whichever axis is read
        y = y + noise * math.sqrt(max(0, enough - size**2))
    elif bool((y > 0).all()):
        y = y * (NOISE * noise).exp()
    else:
        y = y + NOISE * noise * max(NOISE, size)
    return y.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class _Judge:
    """Compares the outputs of the model with those of rewritten tensors. whole: a transform of every group."""

    def __init__(self, model: ModelTensors, whole: Transform, run: Forward) -> None:
        self.model, self.whole, self._run = model, whole, run
        self._rewritten = rewrite(model.tensors, whole)
        double = all(x.dtype == torch.float64 for x in model.tensors.values() if x.is_floating_point())
        self.unchanged = UNCHANGED[torch.float64 if double else torch.float32]
        self._outputs = run(model.tensors).detach().double()
        rows = self._outputs.reshape(-1, self._outputs.shape[-1])
        self._spread = float((rows - (rows.mean(0) if len(rows) > 1 else rows.mean())).abs().max())
        if not (math.isfinite(self._spread) and self._spread > 0):
            raise PlanError(
                f"the model's outputs spread by {self._spread}, expected finite ones that differ from input to input; "
                "check that its weights are trained or random, and give several inputs"
            )

    def difference(self, tensors: Mapping[str, Tensor]) -> float:
        """How far the outputs with these tensors are from the model's own, relative to their spread."""
        change = float((self._run(tensors).detach().double() - self._outputs).abs().max())
        return change / self._spread if math.isfinite(change) else math.inf

    def row(self, trial: _Trial, draw: torch.Generator) -> CheckRow:
        """Carry out a trial."""
        transform = trial.transform(draw)
        if trial.part == "needed":  # the whole transform, but for these tensors
            tensors = {tensor: self.model.tensors[tensor] for tensor, _, _ in trial.places}
            difference = self.difference({**self._rewritten, **rewrite(tensors, transform)})
        else:
            difference = self.difference(rewrite(self.model.tensors, transform))
        if trial.part == "kept":
            return CheckRow(trial.part, trial.what, difference, "unchanged", difference <= self.unchanged)
        if difference <= self.unchanged and (reason := self._reason(trial.places, draw)):
            return CheckRow(trial.part, trial.what, difference, "unchanged", True, reason)
        return CheckRow(trial.part, trial.what, difference, "changed", difference > CHANGED)

    def _reason(self, places: Sequence[Place], draw: torch.Generator) -> str:
        """Why no transform of these places can change the outputs; "" if the outputs depend on them."""
        symmetries, noisy = self.model.symmetries, dict(self.model.tensors)
        for tensor, axis, place in places:
            x = noisy[tensor].clone()
            sizes = symmetries.lengths(tensor, axis, x.shape[axis])
            run = x.narrow(axis, sum(sizes[:place]), sizes[place])
            run += torch.randn(run.shape, dtype=torch.float64, generator=draw).to(x.dtype)
            noisy[tensor] = x
        if self.difference(noisy) > self.unchanged:
            return ""
        tensor, axis, place = places[0]
        part = symmetries.tensors[tensor][axis][place]
        group = symmetries.groups[part.group or ""]
        bias = len(symmetries.tensors[tensor]) == 1
        if bias and part.view == "key" and isinstance(group, Heads) and group.query_key == "linear":
            return "without rotary positions a bias of the keys adds the same to all scores, and softmax takes it away"
        return "the outputs do not depend on these tensors"


def _kind(name: str) -> str:
    """The name with layer numbers replaced, the same for all layers."""
    return re.sub(r"(?<!\w)\d+(?!\w)", "*", name)


def _group_by_kind(symmetries: Symmetries) -> Iterator[tuple[str, Group, list[str]]]:
    """Groups of one kind: their common name, one of them, and the names of all."""
    kinds: dict[tuple[str, Group], list[str]] = {}
    for name, group in symmetries.groups.items():
        family = group if isinstance(group, Heads) else replace(group, count=min(group.count, 2))
        kinds.setdefault((_kind(name), family), []).append(name)
    return ((what, symmetries.groups[names[0]], names) for (what, _), names in kinds.items())


def _has(group: Group, kind: ElementKind) -> bool:
    """True if a group has elements of this kind other than the identity."""
    if isinstance(group, Heads):
        return kind == "inside" or (kind == "order" and max(group.groups, group.per_group) > 1)
    has = {"order": group.count > 1, "scale": group.scale is not None, "rotation": group.rotation is not None}
    return has.get(kind, False)


def _family_trials(model: ModelTensors) -> Iterator[_Trial]:
    for what, group, names in _group_by_kind(model.symmetries):
        for kind in ELEMENT_KINDS:
            if _has(group, kind):
                yield _Trial("kept", f"{what} {kind}", partial(_of_groups, model, names, {kind}))
    if model.symmetries.groups:
        yield _Trial(
            "kept", "all at once", partial(_of_groups, model, list(model.symmetries.groups), set(ELEMENT_KINDS))
        )


def _of_groups(
    model: ModelTensors, names: list[str], kinds: Collection[ElementKind], draw: torch.Generator
) -> Transform:
    return Transform(model.symmetries, *elements_of(model.tensors, model.symmetries, names, kinds, draw))


def _axis_trials(whole: Transform) -> Iterator[_Trial]:
    lines: dict[str, list[Place]] = {}
    for tensor, axes in whole.symmetries.tensors.items():
        for i, axis in enumerate(axes):
            for place, part in enumerate(axis):
                if part.group is not None:
                    what = f"{_kind(tensor)} axis {i}, {_kind(str(part))}"
                    lines.setdefault(what, []).append((tensor, i, place))
    for what, places in lines.items():
        yield _Trial("needed", what, partial(_leave_out, whole, places), places)


def _leave_out(whole: Transform, places: list[Place], _: torch.Generator) -> Transform:
    """The transform without these places: other groups of the same size, without elements, take them over."""
    table = whole.symmetries
    parts = {place: table.tensors[place[0]][place[1]][place[2]] for place in places}
    still = {place: Part(f"{part}, left out") for place, part in parts.items()}
    sizes = {str(still[place]): Units(part_size(table.groups, part)) for place, part in parts.items()}
    return replace(whole, symmetries=replace_parts(table, still, sizes))


def _larger_trials(model: ModelTensors) -> Iterator[_Trial]:
    for what, group, names in _group_by_kind(model.symmetries):
        places = [place for name in names for place in places_of(model.symmetries, name)]
        for larger in LARGER:
            if larger.than(model.symmetries, names[0], group):
                yield _Trial("enough", f"{what} {larger.family}", partial(larger.transform, model, names), places)
