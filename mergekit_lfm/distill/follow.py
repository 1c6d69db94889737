"""The loss of a student that follows teachers: a weighted sum of terms, and maps that are trained beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.distill import terms
from mergekit_lfm.distill.blocks import fed, padded, unpadded
from mergekit_lfm.distill.course import Course, Wanted
from mergekit_lfm.distill.divergences import kd_divergence
from mergekit_lfm.distill.spans import pair_parts
from mergekit_lfm.distill.teachers import IDS, NUMBER, Teacher
from mergekit_lfm.distill.watch import (
    ATTENTION,
    BESIDE,
    FEATURES,
    PLACES,
    SCORES,
    STATE,
    Part,
    Seen,
    targets_of,
    watch,
)
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.distill_terms import DISTILL_TERMS
from mergekit_lfm.runtime.functional import use_plain_attention
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import LOSSES, Said, Terms

ROWS = {"hint": terms.squares, "embed": terms.embed, "attention": terms.attention}
TOGETHER = {"distance": terms.distance, "angle": terms.angle, "triplet": terms.triplet}


@dataclass(frozen=True)
class Follow:
    """The loss of a student by its teachers. Called with the student and a batch that has the numbers of its examples.

    beside: maps from the student's widths to the teachers', and variances, which are trained with the student.
    """

    course: Course
    teachers: Sequence[Teacher]
    beside: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def build(self, student: nn.Module, batch: Batch, seed: int) -> None:
        """Make the maps beside the student, for the widths that a batch shows, and check that all fits."""
        if self.course.wanted(None).attentions:
            use_plain_attention(student)
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(seed)
            device = next(student.parameters()).device
            mine = self._watch(student, batch, self.course.wanted(None))[1]
            for number, teacher in enumerate(self.teachers):
                theirs = teacher.about(batch)
                for name, key, own, other in self._compared(number):
                    a, b = mine[own].values, theirs[other].values
                    self._build_one(name, key, a, b)
            self.beside.to(device, next(iter(mine.values())).values.dtype)
        if self.beside:
            student.add_module(BESIDE, self.beside)

    def _build_one(self, name: str, key: str, mine: Tensor, theirs: Tensor) -> None:
        """Make the map that a term trains for a pair of layers. Raises PlanError for rows or widths that do not fit."""
        if len(mine) != len(theirs):
            raise PlanError(
                f"{name}: the student has {len(mine)} rows where the teacher has {len(theirs)}; expected as many. "
                "Choose layers with as many places"
            )
        narrow, wide = mine.shape[-1], theirs.shape[-1]
        if narrow != wide and DISTILL_TERMS[name].same:
            raise PlanError(f"{name}: the student's width is {narrow} and the teacher's {wide}; expected the same")
        if name == "vid":
            self.beside[key] = Bound(narrow, wide)
        elif name in ("hint", "embed") and narrow != wide:
            self.beside[key] = nn.Linear(narrow, wide, bias=name == "hint")

    def _compared(self, number: int) -> Iterator[tuple[str, str, str, str]]:
        """The terms that compare something else than scores: a name for what they train, and the two parts."""
        for name in self.course.weights:
            reads = DISTILL_TERMS[name].reads
            if reads == "features" and name != "local":
                yield name, f"{name}-{number}", FEATURES, FEATURES
            elif DISTILL_TERMS[name].layered:
                part = ATTENTION if reads == "attentions" else STATE
                for mine, theirs in self.course.pairs[number]:
                    if (mine and theirs) or reads == "states":
                        yield name, f"{name}-{number}-{mine}", part.format(mine), part.format(theirs)

    def _watch(self, student: nn.Module, batch: Batch, wanted: Wanted) -> tuple[Any, dict[str, Part]]:
        plain = {name: x for name, x in batch.items() if name != NUMBER}
        return watch(student, self.course.task, plain, wanted)

    def __call__(self, student: nn.Module, batch: Batch) -> Terms:
        """The loss; in evaluation that of the task itself."""
        plain, task = {name: x for name, x in batch.items() if name not in (NUMBER, PLACES)}, self.course.task
        if not student.training:
            return LOSSES[task](student, plain)
        shown = self.course.shown
        output, mine = self._watch(student, batch, shown) if self.course.weights.keys() - {"lit"} else (None, {})
        targets = targets_of(task, plain)
        said = [teacher.about(batch) for teacher in self.teachers]
        total = torch.zeros((), device=next(student.parameters()).device)
        for name, weight in self.course.weights.items():
            if name == "task":
                whole = LOSSES[task](student if task == "embedding" else Said(output), plain).total
            elif name == "uld":
                whole = self._by_places(mine, said, targets)
            elif DISTILL_TERMS[name].reads == "scores":
                whole = self._by_scores(name, mine, said)
            elif name == "lit":
                whole = self._by_blocks(student, plain, said, targets)
            else:
                whole = self._by_parts(name, mine, said, plain, targets)
            total = total + weight * whole
        return Terms(total, sum(targets))

    def _by_scores(self, name: str, mine: Seen, said: Sequence[Seen]) -> Tensor:
        """A term about scores, summed over targets: by each teacher, or by all as one, each with classes of its own.

        With labels, which decide between teachers, `kd` compares the classes of each teacher among themselves.
        """
        scores, shares = mine[SCORES].values, self.course.shares
        if self.course.classes and name == "kd" and "task" in self.course.weights:
            parts = [scores[:, first : last + 1] for first, last in self.course.classes]
            values = [self._by_score(name, part, seen) for part, seen in zip(parts, said, strict=True)]
            return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()
        if self.course.classes:
            order = sorted(range(len(said)), key=lambda number: self.course.classes[number])
            joined = torch.cat([said[number][SCORES].values for number in order], -1)
            said, shares = [{SCORES: Part(joined, mine[SCORES].counts)}], (1.0,)
        widths = self.course.widths or (None,) * len(said)
        values = [self._by_score(name, scores[:, :width], seen) for seen, width in zip(said, widths, strict=False)]
        return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    def _by_score(self, name: str, scores: Tensor, seen: Seen) -> Tensor:
        course, theirs, ids = self.course, seen[SCORES].values, seen.get(IDS)
        theirs = theirs if ids is not None else theirs[:, : scores.shape[-1]]
        if name == "hard":
            likely = theirs.argmax(-1) if ids is None else ids.values[:, 0]
            return nn.functional.cross_entropy(scores, likely, reduction="sum")
        if name == "logits":
            return terms.squares(scores, theirs).sum()
        if ids is None:
            return kd_divergence(scores, theirs, course.temperature, course.divergence)
        return terms.kd_of_largest(scores, theirs, ids.values, course.temperature, course.divergence)

    def _by_places(self, mine: Seen, said: Sequence[Seen], targets: Sequence[int]) -> Tensor:
        """`uld`: the mean over targets that have a partner in the same place, of examples with as much as they have."""
        values = list[Tensor]()
        for seen, share in zip(said, self.course.shares, strict=True):
            own, other, counts = pair_parts(mine[PLACES], seen[PLACES])
            rows = terms.uld(mine[SCORES].values[own], seen[SCORES].values[other], self.course.temperature)
            values.append(share * _by_example(rows, counts, targets))
        return torch.stack(values).sum()

    def _by_parts(self, name: str, mine: Seen, said: Sequence[Seen], batch: Batch, targets: Sequence[int]) -> Tensor:
        """A term about vectors, states or attention: the mean over layers, of examples with as much as they have."""
        values = list[Tensor]()
        for number, (seen, share) in enumerate(zip(said, self.course.shares, strict=True)):
            if name == "local":
                scores, theirs = mine[SCORES].values, seen[FEATURES].values
                found = [terms.local(scores, theirs, batch["labels"], self.course.temperature)]
            else:
                compared = [each[1:] for each in self._compared(number) if each[0] == name]
                found = [self._by_part(name, key, mine[own], seen[other], targets) for key, own, other in compared]
            values.append(share * torch.stack(found).mean())
        return torch.stack(values).sum()

    def _by_part(self, name: str, key: str, mine: Part, theirs: Part, targets: Sequence[int]) -> Tensor:
        own, other = mine.values, theirs.values
        if DISTILL_TERMS[name].together:
            return len(targets) * TOGETHER[name](own, other)
        if name == "vid":
            rows = self.beside[key](own, other)
        else:
            own = self.beside[key](own) if key in self.beside else own
            rows = ROWS[name](own, other)
        return _by_example(rows, mine.counts, targets)

    def _by_blocks(self, student: nn.Module, batch: Batch, said: Sequence[Seen], targets: Sequence[int]) -> Tensor:
        """Each block of the student from the teacher's states before it: squared differences behind it."""
        values = list[Tensor]()
        for number, (seen, share) in enumerate(zip(said, self.course.shares, strict=True)):
            pairs = self.course.pairs[number]
            states_before = {mine: padded(seen[STATE.format(theirs)], batch) for mine, theirs in pairs}
            last = max(states_before)
            with fed(student, states_before) as given:
                _, seen_mine = watch(student, self.course.task, batch, Wanted(states=(last,)))
            found = list[Tensor]()
            for mine, theirs in pairs:
                states = seen_mine[STATE.format(last)] if mine == last else unpadded(given[mine], batch)
                rows = terms.squares(states.values, seen[STATE.format(theirs)].values)
                found.append(_by_example(rows, states.counts, targets))
            values.append(share * torch.stack(found).mean())
        return torch.stack(values).sum()


class Bound(nn.Module):
    """For `vid`: a map from the student's width to the teacher's, and a variance for each unit, at first ln 2."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.map, self.spread = nn.Linear(narrow, wide), nn.Parameter(torch.zeros(wide))

    def forward(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """The bound for each row of states [rows, width]."""
        return terms.shared_information(self.map(mine), theirs, self.spread)


def _by_example(rows: Tensor, counts: Sequence[int], targets: Sequence[int]) -> Tensor:
    """The sum over examples of the mean of their rows, times how many targets each has."""
    shares = [target / max(1, count) for target, count in zip(targets, counts, strict=True)]
    weights = torch.tensor(shares, dtype=rows.dtype).repeat_interleave(torch.tensor(counts))
    return (rows * weights.to(rows.device)).sum()
