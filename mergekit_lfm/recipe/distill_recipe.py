"""Recipes of `job: distill`: a student trained to follow teachers. Checked before any work, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.recipe.distill_terms import DEFAULTS, DISTILL_TERMS, KdDivergence, check_distill_terms
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference
from mergekit_lfm.recipe.form import Reference, Strict
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at
from mergekit_lfm.recipe.tune_options import check_makes
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.recipe.values import FOUND

LEAST = {"distance": 2, "local": 1, "triplet": 3, "angle": 3}  # examples of a batch for a term about all of them
ALIGNED = ("kd", "hard", "logits")  # terms that compare scores class by class
HEATED = ("kd", "uld", "local")  # terms of predictions at a temperature


class TeacherEntry(Strict):
    """A teacher. weight: its share of the loss, relative to the others.

    classes: those of the student, first and last, that the teacher's classes are, in order.
    """

    model: Reference
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    classes: tuple[int, int] | None = None


def as_teachers(value: object) -> object:
    """One teacher or several, each a model or a mapping with `model`."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(each if isinstance(each, Mapping | Strict) else {"model": each} for each in entries)


def check_ranges(ranges: Iterable[tuple[int, int]]) -> Iterator[Problem]:
    """The problem of classes, first and last of each teacher, that are not all from 0 on, each once."""
    ordered = sorted(ranges)
    ends = [-1, *(last for _, last in ordered)]
    if any(first != end + 1 or last < first for (first, last), end in zip(ordered, ends, strict=False)):
        found = ", ".join(f"{first} to {last}" for first, last in ordered)
        yield problem_at(
            "teachers", FOUND, found=found, expected="classes from 0 on without a gap, each with one teacher"
        )


def _as_layers(value: object) -> object:
    """Layers as pairs, from a mapping of the student's to the teacher's."""
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


Layer = Annotated[int, Field(strict=True, ge=0)]


class DistillRecipe(TrainingRecipe):
    """A distillation as the user wrote it. model: the student. loss: weights of `DISTILL_TERMS`.

    temperature: of `kd`, `uld` and `local`; divergence: of `kd`. top_k: so many of the largest scores of a teacher are
    read, and the rest's share. layers: the student's hidden states and the teacher's that belong together, 0 for the
    embeddings; by default evenly. cache: a folder where what the teachers say is kept for other runs; false keeps the
    teachers in memory instead, as masked_lm needs, whose masks are drawn anew. The rest is as of a training.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, teachers, data and task"
    VERB: ClassVar[str] = "distilling"

    job: Literal["distill"]
    teachers: Annotated[tuple[TeacherEntry, ...], BeforeValidator(as_teachers), Field(min_length=1)]
    temperature: float = Field(default=2.0, ge=0.01, le=1000)
    divergence: KdDivergence = "forward"
    top_k: int | None = Field(default=None, strict=True, ge=1)
    layers: Annotated[tuple[tuple[Layer, Layer], ...], BeforeValidator(_as_layers)] = ()
    cache: bool | Annotated[str, Field(min_length=1)] | None = None

    _teachers: tuple[FoundModel, ...] = PrivateAttr(default=())

    def _check_loss(self, method: TuneMethod[Any]) -> Iterator[Problem]:
        yield from check_distill_terms(self.loss, self.task, method.makes)
        yield from check_makes(method)

    def _read_more(self, where: Where) -> Iterable[Problem]:
        found = list[FoundModel]()
        for i, entry in enumerate(self.teachers):
            model, problems = attempt(partial(find_reference, entry.model, where), f"teachers[{i}].model")
            yield from problems
            found += [] if model is None else [model]
        self._teachers = tuple(found)
        yield from self._check_settings()
        yield from self._check_classes()

    def _check_settings(self) -> Iterator[Problem]:
        """The problems of settings without the term that they are for."""
        set_here, terms = self.model_fields_set, self.terms
        for name, owners in (
            ("temperature", HEATED),
            ("divergence", ("kd",)),
            ("top_k", ("kd", "hard")),
            ("layers", tuple(name for name, term in DISTILL_TERMS.items() if term.layered)),
        ):
            if name in set_here and getattr(self, name) is not None and not terms.keys() & {*owners}:
                yield problem_at(
                    name, FOUND, found="it", expected=f"none without {' or '.join(owners)} in the loss; leave it out"
                )
        for name in ("logits", "uld"):
            if self.top_k is not None and name in terms:
                expected = f"none with {name}, which reads all scores"
                yield problem_at("top_k", FOUND, found=str(self.top_k), expected=expected)
        if self.task == "masked_lm" and self.cache not in (None, False):
            expected = "false for masked_lm, whose masks are drawn anew in each step"
            yield problem_at("cache", FOUND, found=str(self.cache), expected=expected)
        if "attention" in terms and any(0 in pair for pair in self.layers):
            yield problem_at("layers", FOUND, found="0, the embeddings", expected="layers from 1 on, for attention")
        least = max((LEAST[name] for name in self.together), default=1)
        if self.batch_size < least:
            expected = f"{least} or more for {', '.join(self.together)}"
            yield problem_at("batch_size", FOUND, found=str(self.batch_size), expected=expected)
        if len({mine for mine, _ in self.layers}) < len(self.layers):
            yield problem_at("layers", FOUND, found="a layer of the student twice", expected="each once")

    def _check_classes(self) -> Iterator[Problem]:
        """The problems of classes that the teachers share among them."""
        ranges = [entry.classes for entry in self.teachers]
        if not any(ranges):
            return
        if not all(ranges) or self.task != "classification":
            expected = "`classes` of every teacher or of none, for classification alone"
            yield problem_at("teachers", FOUND, found="classes", expected=expected)
            return
        yield from check_ranges(each for each in ranges if each is not None)
        if not self.terms.keys() & {*ALIGNED}:
            expected = f"none without {' or '.join(ALIGNED)} in the loss"
            yield problem_at("teachers", FOUND, found="classes", expected=expected)
        if self.top_k is not None:
            yield problem_at("top_k", FOUND, found=str(self.top_k), expected="none with teachers of some classes each")

    @property
    def terms(self) -> Mapping[str, float]:
        """The weights of the terms."""
        return self.loss or DEFAULTS.get(self.task, {})

    @property
    def together(self) -> list[str]:
        """The terms that are about all examples of a batch at once."""
        return [name for name in self.terms if name in DISTILL_TERMS and DISTILL_TERMS[name].together]

    @property
    def compares_batches(self) -> bool:
        return bool(self.together) or (self.task == "embedding" and "task" in self.terms)

    @property
    def is_labelled(self) -> bool:
        """Whether the labels, or positives, of the data are read."""
        return bool({"task", "local"} & self.terms.keys()) or self.dev is not None

    @property
    def by_places(self) -> bool:
        return any(DISTILL_TERMS[name].any_tokenizer for name in self.terms if name in DISTILL_TERMS)

    @property
    def is_cached(self) -> bool:
        """Whether the teachers are asked before the training, one after the other, and not in each step."""
        return self.task != "masked_lm" if self.cache is None else self.cache is not False

    @property
    def found_teachers(self) -> tuple[FoundModel, ...]:
        """The teachers."""
        return self._teachers

    @property
    def cache_folder(self) -> Path | None:
        """Where what the teachers say is kept for other runs."""
        return Path(self.cache).expanduser() if isinstance(self.cache, str) else None

    def normalised(self) -> dict[str, Any]:
        optional: dict[str, Any] = {"top_k": self.top_k} if self.top_k is not None else {}
        optional |= {"layers": [[*pair] for pair in self.layers]} if self.layers else {}
        teachers = [entry.model_dump(mode="json", exclude_none=True) for entry in self.teachers]
        own = {"teachers": teachers, "loss": dict(sorted(self.terms.items())), **optional}
        own |= {"temperature": self.temperature} if {*HEATED} & self.terms.keys() else {}
        own |= {"divergence": self.divergence} if "kd" in self.terms else {}
        return {**super().normalised(), **own}
