"""Recipes of `job: synthesise`: images without data, and a student that learns from them. Checked without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.recipe.distill_recipe import as_teachers, check_ranges
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Reference, Strict, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.synthesise_presets import PRESETS, Family, Preset, find_preset
from mergekit_lfm.recipe.values import FOUND, NamedFile

JOB = "synthesise"
DEFAULT = "deepinversion"
DRAWN = (1, 3)  # channels of images that a picture can show
# Keys that a family does not read.
UNREAD: Mapping[Family, tuple[str, ...]] = {"pixels": (), "generator": ("count", "steps"), "wild": ("rounds",)}
# Files: what each should be, and the needs of a preset that it serves.
FILES: Mapping[str, tuple[str, frozenset[str]]] = {
    "stats": ("a file of `mergekit-lfm stats gram`", frozenset({"batch_norm", "records"})),
    "data": ("an .npz file of images of the teacher's", frozenset({"batch_norm", "records", "clusters"})),
    "images": ("an .npz file of images of any kind", frozenset({"proxy", "wild"})),
}
OWN = ("student", *FILES, "size", "low", "high", "count", "steps", "rounds")
Number = Annotated[int, Field(strict=True, ge=1)]
Pixel = Annotated[float, Field(allow_inf_nan=False)]
Classes = tuple[int, int]
File = Annotated[str | None, BeforeValidator(read_reference)]


class ImageTeacher(Strict):
    """A classifier of images. classes: those of the student, first and last, that its own are, in order."""

    model: Reference
    classes: Classes | None = None


class SynthesiseRecipe(JobForm):
    """Images as the user asks for them. teachers: one classifier of images, or several.

    Several teachers have classes of their own; by default those of the first come first. preset: a row of `PRESETS`.
    student: another classifier, of all these classes, which learns from the images. student_out: where it is written,
    relative to the folder of the images; later stages take it by this text. stats, data, images: facts that a preset
    may need. size: height and width; low, high: the range of pixels; all three are the model's by default. count:
    images that gradients make or that are chosen; steps: of the student on these; rounds: of a generator, or steps of
    gradients.

    Build one with `SynthesiseRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with teachers and preset"

    job: Literal["synthesise"]
    teachers: Annotated[tuple[ImageTeacher, ...], BeforeValidator(as_teachers), Field(min_length=1)]
    preset: str = DEFAULT
    student: Reference | None = None
    student_out: File = None
    stats: File = None
    data: File = None
    images: File = None
    size: Number | None = None
    low: Pixel | None = None
    high: Pixel | None = None
    count: Annotated[int, Field(strict=True, ge=2)] | None = None
    steps: Number | None = None
    rounds: Number | None = None
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: File = None

    _teachers: tuple[tuple[FoundModel, Classes | None], ...] = PrivateAttr(default=())
    _student: FoundModel | None = PrivateAttr(default=None)
    _files: dict[str, NamedFile] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        problems = list[Problem]()
        for i, entry in sorted(enumerate(self.teachers), key=lambda pair: pair[1].classes or (0, 0)):
            teacher, missing = attempt(partial(find_reference, entry.model, where), f"teachers[{i}].model")
            problems += missing
            self._teachers += () if teacher is None else ((teacher, entry.classes),)
        if self.student is not None:
            self._student, missing = attempt(partial(find_reference, self.student, where), "student")
            problems += missing
        for key, (expected, _) in FILES.items():
            if (ref := getattr(self, key)) is not None:
                file, missing = read_file(ref, where, key, expected)
                problems += missing
                self._files |= {} if file is None else {key: file}
        row, unknown = attempt(partial(find_preset, self.preset), "preset")
        problems += [*unknown, *self._idle_keys(), *([] if row is None else self._check_row(row))]
        problems += self._check_classes()
        refuse(problems)
        return self

    def _idle_keys(self) -> Iterator[Problem]:
        """The keys that have no effect without a student, and a range of pixels that has none."""
        for key in ("student_out", "steps"):
            if getattr(self, key) is not None and self.student is None:
                yield problem_at(key, FOUND, found="it without `student`", expected="both or neither")
        if not (-math.inf if self.low is None else self.low) < (math.inf if self.high is None else self.high):
            yield problem_at("high", FOUND, found=f"{self.high:g}", expected=f"a number above low, {self.low:g}")

    def _check_row(self, row: Preset) -> Iterator[Problem]:
        """The keys that a preset does not read."""
        given = {key for key in OWN if getattr(self, key) is not None}
        unread = [key for key in UNREAD[row.family] if key in given]
        unread += [key for key, (_, served) in FILES.items() if key in given and not served.intersection(row.needs)]
        for key in unread:
            yield problem_at(key, FOUND, found="it", expected=f"none: {row.name} does not read {key}; leave it out")
        for key in ("stats", "data"):
            if key in given and len(self.teachers) > 1:
                yield problem_at(key, FOUND, found="it", expected="none with several teachers; leave it out")

    def _check_classes(self) -> Iterator[Problem]:
        """The problems of classes that the teachers share among them."""
        ranges = [entry.classes for entry in self.teachers if entry.classes is not None]
        if ranges and len(ranges) < len(self.teachers):
            yield problem_at("teachers", FOUND, found="classes", expected="those of every teacher, or of none")
        else:
            yield from check_ranges(ranges)
        names = [entry.model for entry in self.teachers]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield problem_at("teachers", FOUND, found=f"{name} twice", expected="each once")

    @property
    def row(self) -> Preset:
        """The preset."""
        return PRESETS[self.preset]

    @property
    def found_teachers(self) -> tuple[tuple[FoundModel, Classes | None], ...]:
        """The teachers in the order of their classes, with these if the recipe says them."""
        return self._teachers

    @property
    def found_student(self) -> FoundModel | None:
        """The student."""
        return self._student

    def file(self, key: str) -> Path | None:
        """A file, by its key."""
        return self._files[key].path if key in self._files else None

    def student_place(self, out: Path) -> Path | None:
        """The folder of the student, for the file of the images; None without one."""
        if self.student is None:
            return None
        return out.parent / Path(self.student_out or f"{out.stem}-student").expanduser()

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same images on any machine."""
        own = {key: x for key in OWN if (x := getattr(self, key)) is not None}
        teachers = [entry.model_dump(mode="json", exclude_none=True) for entry in self.teachers]
        return {"job": JOB, "teachers": teachers, "preset": self.preset, "seed": self.seed, **own}
