"""Match tensors across models, list those dropped, and report all misfits in one message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_lfm.arch.kinds import Kind, kind_of
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.rows import VOCABULARY, Rows
from mergekit_lfm.plan.sources import TensorRef
from mergekit_lfm.plan.ties import Row, rows_of, twins_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec

Dropped = tuple[str, str, str]  # (model, tensor, reason)

DROPPED = "the recipe drops it"
TIED = "tied to the embedding by the model's config"


@dataclass(frozen=True, slots=True)
class Match:
    """An output tensor, `spec`, and its source in each model, by the model's index.

    One source of several models: the tensor is that model's, whatever the others have. tied: its other names in the
    output, under which it is written too. twins: pairs of tensors of one model that have to be equal. kept: the element
    from which on it is the template's, None if it is all merged.
    """

    spec: TensorSpec
    sources: Mapping[int, str]
    kind: Kind = "parameter"
    tied: tuple[str, ...] = ()
    twins: tuple[tuple[TensorRef, TensorRef], ...] = ()
    kept: int | None = None


def match_tensors(
    recipe: Recipe, vocabulary: Rows, labels: Sequence[str], template: int
) -> tuple[dict[str, Match], tuple[Dropped, ...]]:
    """The match of each output tensor by its name, and all tensors and rows that are dropped.

    vocabulary: the recipe's models.

    Raises PlanError with all tensors that only some models have, or have in one shape, unless the recipe chooses what
    becomes of them; buffers that loaders recompute and tied heads may differ.
    """
    models = vocabulary.models
    rows, apart = rows_of(models, template)
    matching = _Matching(recipe, models, labels, template)
    for i, name in apart:
        matching.misfits.append(
            f"{labels[i]} has a {name} of its own, but the config of {labels[template]} ties it to the embedding, so "
            "loaders would not use the merged head: choose an untied model as the base"
        )
    for row in rows:
        matching.add(row)
    matching.refuse(rows)
    matches = matching.matches
    for name, count in vocabulary.kept.items():
        if name in matches and len(matches[name].sources) > 1:
            shape = matches[name].spec.shape
            matches[name] = replace(matches[name], kept=count * math.prod(shape[1:]))
    beyond = "beyond the rows of the shortest vocabulary" if recipe.rows == "crop" else "beyond the base's vocabulary"
    cut = [(labels[i], f"{name}, its last {count} rows", beyond) for i, name, count in vocabulary.cut]
    return matches, (*matching.dropped(), *cut)


@dataclass
class _Matching:
    """The matches so far, and what does not fit."""

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

    def add(self, row: Row) -> None:
        """Match a tensor, or find out why it does not fit."""
        row = self._without_dropped(row)
        name = row.names[0]
        first = next(iter(row.held))
        home = self.template if self.template in row.held else first
        stored = self.models[home][row.held[home][0]]
        spec = TensorSpec(name, stored.shape, stored.dtype)
        sources = {i: names[0] for i, names in row.held.items()}
        match = Match(spec, sources, kind_of(spec), row.names[1:], tuple(twins_of(row)))
        kept, why = self._choose(match)
        self.unused |= {
            (i, each): TIED if i in kept else why
            for i, names in row.held.items()
            for each in names
            if i not in kept or each not in (match.sources[i], *row.names)
        }
        if kept:
            self._keep(match, kept)

    def _without_dropped(self, row: Row) -> Row:
        """The row without the names, beside its first, that the recipe drops."""
        if len(row.names) == 1:
            return row
        wanted = {name for name in row.names[1:] if self._choice(name) == "drop"}
        if not wanted:
            return row
        self.unused |= {(i, name): DROPPED for i, names in row.held.items() for name in names if name in wanted}
        held = {i: tuple(name for name in names if name not in wanted) for i, names in row.held.items()}
        names = tuple(name for name in row.names if name not in wanted)
        return Row(names, {i: names for i, names in held.items() if names})

    def _choice(self, name: str) -> str | None:
        """The recipe's choice for a tensor; None without one."""
        for part, choice in self.recipe.keep.items():
            if part in name:
                return choice
        return None

    def _choose(self, match: Match) -> tuple[Sequence[int], str]:
        """The models whose tensors go into the output, and why those of the others do not."""
        holders, theirs = tuple(match.sources), self.template not in match.sources
        choice = self._choice(match.spec.name)
        if choice is not None:
            return self._take(match, choice)
        if theirs and match.kind in ("constant", "counter"):
            return (), "a buffer that loaders recompute, which the template lacks"
        if match.kind == "constant":
            return [self.template], "a buffer that loaders recompute; the template's is kept"
        if self._fits(match):
            return holders, ""
        if self.recipe.tensors == "common":
            kept = [] if theirs else [self.template]
            return kept, "the template lacks it" if theirs else "not all models have it in this shape"
        self._note_misfit(match, theirs)
        return holders, ""

    def _take(self, match: Match, choice: str) -> tuple[Sequence[int], str]:
        """The model that the recipe wants a tensor from, and why not those of the others."""
        if choice == "drop":
            return (), DROPPED
        keeper = self.template if choice == "base" else self.labels.index(choice)
        if keeper not in match.sources and choice != "base":
            self.misfits.append(
                f"`keep` takes {match.spec.name} from {choice}, which lacks it: choose another model, base or drop"
            )
        return [i for i in match.sources if i == keeper], f"the recipe keeps that of {self.labels[keeper]}"

    def _fits(self, match: Match) -> bool:
        """True if all models have the tensor in one shape; of counters, those that have one."""
        enough = match.kind == "counter" or len(match.sources) == len(self.models)
        return enough and {self.models[i][name].shape for i, name in match.sources.items()} <= {match.spec.shape}

    def _note_misfit(self, match: Match, theirs: bool) -> None:
        name, shape = match.spec.name, list(match.spec.shape)
        if theirs:
            self.extra += [(i, name) for i in match.sources]
            return
        self.missing += [(i, name) for i in range(len(self.models)) if i not in match.sources]
        for i, source in match.sources.items():
            if self.models[i][source].shape != match.spec.shape:
                self.misshapen.append(name)
                theirs_is = f"{name} is {list(self.models[i][source].shape)} in {self.labels[i]}"
                self.misfits.append(f"{theirs_is}, {shape} in {self.labels[self.template]}")

    def _keep(self, match: Match, kept: Sequence[int]) -> None:
        """Record a match of these models. A single one's tensor keeps its form."""
        if len(kept) == len(match.sources):
            self.matches[match.spec.name] = match
            return
        sources = {i: match.sources[i] for i in kept}
        if len(sources) == 1:
            ((i, source),) = sources.items()
            spec = self.models[i][source]
            match = replace(match, spec=TensorSpec(match.spec.name, spec.shape, spec.dtype))
        twins = tuple(pair for pair in match.twins if pair[0][0] in sources)
        self.matches[match.spec.name] = replace(match, sources=sources, twins=twins)

    def dropped(self) -> Iterator[Dropped]:
        """All that goes into no output tensor."""
        used = {(i, name) for match in self.matches.values() for i, name in match.sources.items()}
        for i, (label, model) in enumerate(zip(self.labels, self.models, strict=True)):
            yield from ((label, name, why) for name, why in model.dropped.items())
            left = ((name, self.unused.get((i, name))) for name in model if (i, name) not in used)
            yield from ((label, model.name_in_files(name), why) for name, why in left if why is not None)

    def refuse(self, rows: Sequence[Row]) -> None:
        """Raise PlanError about all that does not fit, with the lines that a recipe may add."""
        unmatched = [part for part in self.recipe.keep if not any(part in name for row in rows for name in row.names)]
        self.misfits += [f"`keep`: {part!r} is part of no tensor's name; correct or remove it" for part in unmatched]
        if not (self.misfits or self.missing or self.extra):
            return
        found = several("the checkpoints differ", [*self._list_names(), *self.misfits])
        cure = "\n".join(self._cures())
        raise PlanError("{found}\n{cure}" if cure else "{found}", found=found, cure=cure)

    def _cures(self) -> Iterator[str]:
        """The lines that a recipe may add."""
        first = self.labels[self.template]
        names = [*(name for _, name in (*self.missing, *self.extra)), *self.misshapen]
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
