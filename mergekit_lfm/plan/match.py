"""Match tensors across models, list those dropped, and report all misfits in one message."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_lfm.arch.experts import APART, TOGETHER
from mergekit_lfm.arch.heads import HEAD, POOLER
from mergekit_lfm.arch.kinds import Kind, kind_of
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.roles import PartRoles, TensorRef
from mergekit_lfm.plan.rows import VOCABULARY
from mergekit_lfm.plan.ties import Row, rows_of, twins_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec

Dropped = tuple[str, str, str]  # (model, tensor, reason)

DROPPED = "the recipe drops it"
TIED = "tied to the embedding by the model's config"


@dataclass(frozen=True, slots=True)
class Match:
    """An output tensor, `spec`, and its source in each model, by the model's index in its part of the recipe.

    One source of several models: the tensor is that model's, whatever the others have. tied: its other names in the
    output, under which it is written too. twins: pairs of tensors of one model that have to be equal. kept: the element
    from which on it is the tensor `rest`, None if it is all merged.
    """

    spec: TensorSpec
    sources: Mapping[int, TensorRef]
    kind: Kind = "parameter"
    tied: tuple[str, ...] = ()
    twins: tuple[tuple[TensorRef, TensorRef], ...] = ()
    kept: int | None = None
    rest: TensorRef | None = None


def match_tensors(roles: PartRoles, kept: Mapping[str, int]) -> tuple[dict[str, Match], tuple[Dropped, ...]]:
    """The match of each output tensor of a part by its name, and all tensors that are dropped.

    kept: as of `Rows`.

    Raises PlanError with all tensors that only some models have, or have in one shape, unless the recipe chooses what
    becomes of them; buffers that loaders recompute and tied heads may differ.
    """
    models, labels, template = roles.models, roles.labels, roles.template
    rows, apart = rows_of(models, template)
    matching = _Matching(roles, roles.recipe, models, labels, template)
    for i, name in apart:
        if matching.choice(name) in ("base", "drop"):
            continue  # among the rows, as a tensor of that model alone
        matching.misfits.append(
            f"{labels[i]} has a {name} of its own, but the config of {labels[template]} ties it to the embedding, so "
            "loaders would not use the merged head: choose an untied model as the base"
        )
    for row in rows:
        matching.add(row)
    matching.refuse()
    matches = matching.matches
    for name, count in kept.items():
        if name in matches and len(matches[name].sources) > 1:
            shape = matches[name].spec.shape
            rest = matches[name].sources[template]
            matches[name] = replace(matches[name], kept=count * math.prod(shape[1:]), rest=rest)
    return matches, tuple(matching.dropped())


def refuse_unmatched(recipe: Recipe, names: Collection[str]) -> None:
    """Raise PlanError about each key of `keep` that is part of none of the tensors' names."""
    unmatched = [part for part in recipe.keep if not any(part in name for name in names)]
    if unmatched:
        lines = [f"`keep`: {part!r} is part of no tensor's name; correct or remove it" for part in unmatched]
        raise PlanError(several("the recipe does not fit the checkpoints", lines))


@dataclass
class _Matching:
    """The matches so far, and what does not fit."""

    roles: PartRoles
    recipe: Recipe
    models: Sequence[Checkpoint]
    labels: Sequence[str]
    template: int
    matches: dict[str, Match] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)  # in one line each
    missing: list[TensorRef] = field(default_factory=list)  # tensors of the template that a model lacks
    extra: list[TensorRef] = field(default_factory=list)  # tensors that the template lacks
    misshapen: list[str] = field(default_factory=list)
    unused: dict[TensorRef, str] = field(default_factory=dict)  # why
    used: set[TensorRef] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Match a tensor, or find out why it does not fit."""
        row = self._without_dropped(row)
        name = row.names[0]
        first = next(iter(row.held))
        home = self.template if self.template in row.held else first
        spec = self.models[home][row.held[home][0]]
        spec = TensorSpec(name, spec.shape, spec.dtype)
        kind = kind_of(spec)
        kept, why = self._choose(spec, kind, row)
        self.unused |= {
            (i, each): TIED if i in kept else why
            for i, names in row.held.items()
            for each in names
            if i not in kept or each not in (names[0], *row.names)
        }
        if kept:
            self._keep(spec, kind, row, kept)

    def _without_dropped(self, row: Row) -> Row:
        """The row without the names, beside its first, that the recipe drops."""
        if len(row.names) == 1:
            return row
        wanted = {name for name in row.names[1:] if self.choice(name) == "drop"}
        if not wanted:
            return row
        self.unused |= {(i, name): DROPPED for i, names in row.held.items() for name in names if name in wanted}
        held = {i: tuple(name for name in names if name not in wanted) for i, names in row.held.items()}
        names = tuple(name for name in row.names if name not in wanted)
        return Row(names, {i: names for i, names in held.items() if names})

    def choice(self, name: str) -> str | None:
        """The recipe's choice for a tensor; None without one."""
        for part, choice in self.recipe.keep.items():
            if part in name:
                return choice
        return self.recipe.heads if self.recipe.heads and HEAD.search(name) else None

    def _choose(self, spec: TensorSpec, kind: Kind, row: Row) -> tuple[Sequence[int], str]:
        """The models whose tensors go into the output, and why those of the others do not."""
        holders, theirs = tuple(row.held), self.template not in row.held
        choice = self.choice(spec.name)
        if choice is None and self.recipe.heads and POOLER.search(spec.name) and not self._fits(spec, kind, row):
            choice = self.recipe.heads
        if choice is not None:
            return self._take(spec.name, row, choice)
        if theirs and kind in ("constant", "counter"):
            return (), "a buffer that loaders recompute, which the template lacks"
        if kind == "constant":
            return [self.template], "a buffer that loaders recompute; the template's is kept"
        if self._fits(spec, kind, row):
            return holders, ""
        if self.recipe.tensors == "common":
            kept = [] if theirs else [self.template]
            return kept, "the template lacks it" if theirs else "not all models have it in this shape"
        self._note_misfit(spec, row, theirs)
        return holders, ""

    def _take(self, name: str, row: Row, choice: str) -> tuple[Sequence[int], str]:
        """The model that the recipe wants a tensor from, and why not those of the others."""
        if choice == "drop":
            return (), DROPPED
        keeper = self.template if choice == "base" else self.labels.index(choice) if choice in self.labels else None
        if keeper not in row.held and choice != "base":
            self.misfits.append(
                f"`keep` takes {name} from {choice}, which lacks it: choose another model, base or drop"
            )
        keepers = [i for i in row.held if i == keeper]
        return keepers, f"the recipe keeps that of {self.labels[self.template] if choice == 'base' else choice}"

    def _fits(self, spec: TensorSpec, kind: Kind, row: Row) -> bool:
        """True if all models have the tensor in one shape; of counters, those that have one."""
        enough = kind == "counter" or len(row.held) == len(self.models)
        return enough and {self.models[i][names[0]].shape for i, names in row.held.items()} <= {spec.shape}

    def _note_misfit(self, spec: TensorSpec, row: Row, theirs: bool) -> None:
        name, shape = spec.name, list(spec.shape)
        if theirs:
            self.extra += [(i, name) for i in row.held]
            return
        self.missing += [(i, name) for i in range(len(self.models)) if i not in row.held]
        for i, names in row.held.items():
            if self.models[i][names[0]].shape != spec.shape:
                self.misshapen.append(name)
                theirs_is = f"{name} is {list(self.models[i][names[0]].shape)} in {self.labels[i]}"
                self.misfits.append(f"{theirs_is}, {shape} in {self.labels[self.template]}")

    def _keep(self, spec: TensorSpec, kind: Kind, row: Row, kept: Sequence[int]) -> None:
        """Record a match of these models. A single one's tensor keeps its form."""
        held = {i: row.held[i][0] for i in kept}
        if len(held) == 1:
            ((i, source),) = held.items()
            spec = TensorSpec(spec.name, self.models[i][source].shape, self.models[i][source].dtype)
        refer = self.roles.refer
        twins = tuple([(refer(*one), refer(*other)) for one, other in twins_of(row) if one[0] in held])
        sources = {i: refer(i, name) for i, name in held.items()}
        self.matches[spec.name] = Match(spec, sources, kind, row.names[1:], twins)
        self.used.update(held.items())

    def dropped(self) -> Iterator[Dropped]:
        """All that goes into no output tensor."""
        for i, (label, model) in enumerate(zip(self.labels, self.models, strict=True)):
            left = ((name, self.unused.get((i, name))) for name in model if (i, name) not in self.used)
            yield from ((label, model.name_in_files(name), why) for name, why in left if why is not None)

    def refuse(self) -> None:
        """Raise PlanError about all that does not fit, with the lines that a recipe may add."""
        if not (self.misfits or self.missing or self.extra):
            return
        found = several("the checkpoints differ", [*self._list_names(), *self.misfits])
        cure = "\n".join(self._cures())
        raise PlanError("{found}\n{cure}" if cure else "{found}", found=found, cure=cure)

    def _cures(self) -> Iterator[str]:
        """The lines that a recipe may add."""
        first = self.labels[self.template]
        names = [*(name for _, name in (*self.missing, *self.extra)), *self.misshapen]
        if experts := self._find_experts():
            yield (
                f"The models hold experts in different layouts: {experts[0]} is a part of one, {experts[1]} all of a "
                "layer. No known layout joins these names, expected a line in mergekit_lfm/arch/experts.py. Save the "
                "models in one layout, as transformers does when it loads and saves them"
            )
        if any(map(self._is_of_head, names)):
            yield (
                f"The models have different heads: add `heads: base` to the recipe to keep that of {first}, or "
                "`heads: drop` for a model without one; or give `merge` this as `--heads`"
            )
        if any(VOCABULARY.search(name) for name in self.misshapen):
            yield (
                "One of the vocabularies was padded or resized: add `rows: crop` to merge the rows of the shortest "
                f"and leave out the others, or `rows: keep` to keep those of {first} beyond it"
            )
        if names:
            part = _part_of(names[0], [name for name in self.matches if name not in names])
            yield (
                f"To merge only what all models share and keep the rest of {first}, add `tensors: common` to the "
                f"recipe; to choose for some tensors, `keep: {{{part}: base}}`, or `drop`, or one of the models"
            )

    def _is_of_head(self, name: str) -> bool:
        """True for a tensor of a head, or a pooler, that differs in more than the length of the vocabulary."""
        if name in self.misshapen and VOCABULARY.search(name):
            return False
        return bool(HEAD.search(name) or POOLER.search(name))

    def _find_experts(self) -> tuple[str, str] | None:
        """A tensor of one expert that only one model has, and one of all experts that only another has."""
        alone = [[name for _, name in side] for side in (self.missing, self.extra)]
        for one, other in (alone, alone[::-1]):
            apart, together = filter(APART.search, one), filter(TOGETHER.search, other)
            if pair := next(zip(apart, together, strict=False), None):
                return pair
        return None

    def _list_names(self) -> Iterator[str]:
        """A line for each tensor that only some models have; one for all of a model where their beginnings differ."""
        first, label = self.models[self.template], self.labels
        for i in range(len(self.models)):
            missing = [name for j, name in self.missing if j == i]
            extra = [name for j, name in self.extra if j == i]
            beginning = _common_beginning(extra) if missing and len(extra) > 3 else ""
            if beginning and not any(name.startswith(beginning) for name in first):
                yield (
                    f"all {len(extra)} tensors of {label[i]} that {label[self.template]} lacks begin with "
                    f"{beginning!r}, as none of {label[self.template]} does, and {len(missing)} of its own are missing "
                    f"there, such as {missing[0]}: if only the names differ, add `rename: {{{beginning!r}: ...}}` "
                    f"beside {label[i]}"
                )
                continue
            yield from (f"{label[i]} lacks {first[name]}, which {label[self.template]} has" for name in missing)
            yield from (f"{label[i]} has {self.models[i][name]}, which {label[self.template]} lacks" for name in extra)


def _common_beginning(names: Iterable[str]) -> str:
    """The parts with which all names begin, with the dot behind them."""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _part_of(name: str, others: Sequence[str]) -> str:
    """The beginning of a name that no other tensor's name contains, else the name."""
    parts = name.split(".")
    beginnings = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((part for part in beginnings if not any(part in other for other in others)), name)
