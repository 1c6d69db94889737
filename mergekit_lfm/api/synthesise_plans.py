"""Images without data that are planned: their teachers, the preset, their form, and the places of the results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.api.attachments import ReadModel, open_named
from mergekit_lfm.api.image_forms import image_form
from mergekit_lfm.api.tune_plans import TRAINING
from mergekit_lfm.distill.course import labels_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.output.file_request import IMAGES, PICTURE, FileRequest, read_lock_beside
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.output.save import stand_in
from mergekit_lfm.recipe.synthesise_presets import check_needs
from mergekit_lfm.recipe.synthesise_recipe import DRAWN, FILES, JOB, SynthesiseRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.places import beside, check_file, check_outside
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.views.adapted import open_found

CLASSES = 2  # of a config that does not say how many: transformers' own number
STATISTICS = "running_mean"  # ends the names of BatchNorm's tensors

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class ImagesRequest(FileRequest):
    """The request that images answer, with the student that learned from them. student: its folder."""

    student: Path | None = None

    def is_answered(self, out: Path, *, overwrite: bool) -> bool:
        if out.is_file() and not overwrite and self.is_of(out):
            return True
        ours = overwrite or self._is_written(out)
        super().is_answered(out, overwrite=ours)
        check_file(out.with_suffix(PICTURE), self.paths.values(), overwrite=ours)
        if self.student is not None:
            check_outside(out, [self.student])
            self.is_learned(overwrite=overwrite)
        return False

    def is_of(self, out: Path) -> bool:
        return self._is_written(out) and (self.student is None or self.request.is_of(self.student))

    def is_learned(self, *, overwrite: bool) -> bool:
        """True if the student is there, whole; raises PlanError if it must not be written."""
        assert self.student is not None
        return self.request.is_answered(self.student, overwrite=overwrite)

    def _is_written(self, out: Path) -> bool:
        """True if the images are those of this request; a run that was killed then may leave the student to write."""
        return super().is_of(out)


@dataclass(frozen=True)
class PlannedImages:
    """Images that are checked, and not made yet. shape: of each; low, high: the range of pixels.

    student: a model, and the folder it goes to. device: where the models run.
    """

    recipe: SynthesiseRecipe
    out: Path
    teachers: tuple[ReadModel, ...]
    student: tuple[Checkpoint, Path] | None
    shape: Shape
    pixels: tuple[float, float]
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read besides the models."""
        named = [self.recipe.file(key) for key in FILES]
        return (*(path for path in named if path is not None), *(path for each in self.teachers for path in each.files))

    @property
    def training(self) -> Path:
        """The folder for the state."""
        return beside(self.out, TRAINING)

    @property
    def picture(self) -> Path | None:
        """The place of the picture; None for images that none can show."""
        return self.out.with_suffix(PICTURE) if self.shape[0] in DRAWN else None

    @cached_property
    def request(self) -> ImagesRequest:
        """The request that the images answer: the recipe, and the content of the models and files."""
        recipe = self.recipe
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0], "shape": [*self.shape]}
        whole |= {"pixels": [*self.pixels], "content": [digest_file(path) for path in self.files]}
        models = {each.ref: each.source for each in self.teachers}
        models |= {} if self.student is None else {str(recipe.student): self.student[0]}
        refs = {key: str(ref) for key in ("student", *FILES) if (ref := getattr(recipe, key)) is not None}
        names = public_names([*models, *refs.values()])
        teachers = [{**entry, "model": names[entry["model"]]} for entry in whole["teachers"]]
        public = {**whole, "teachers": teachers, **{key: names[ref] for key, ref in refs.items()}}
        inputs = tuple(RequestInput(ref, source, source.config) for ref, source in models.items())
        request = Request(whole, public, inputs, LOCK)

        def answers(out: Path) -> bool:
            lock = read_lock_beside(out, JOB)
            return bool(lock["request"] == request.digest and lock["content"] == digest_file(out))

        place = None if self.student is None else self.student[1]
        return ImagesRequest(request, self.files, "a file of images with its lock", answers, place)

    def stand_in(self, file: Path) -> None:
        """Write a file of a gray image of each class, and a folder like the student without data."""
        import numpy as np

        classes, buffer = sum(classes_of(each.source) for each in self.teachers), io.BytesIO()
        middle = sum(self.pixels) / 2
        pixels = np.full((classes, *self.shape), middle, np.float32)
        np.savez(buffer, pixel_values=pixels, labels=np.arange(classes))
        file.write_bytes(buffer.getvalue())
        if self.student is not None and (place := self.recipe.student_place(file)) is not None:
            stand_in(self.student[0], place)


def plan_synthesis(
    recipe: SynthesiseRecipe, out: Path, *, device: str | None = None, student_out: Path | None = None
) -> PlannedImages:
    """Check a recipe of images without data. Reads headers and configs. student_out: in place of the recipe's.

    Raises PlanError without the device, for an output of another suffix than .npz, for models that do not go together,
    and with all that the preset needs and is not given; FormatError for a damaged model.
    """
    if out.suffix != IMAGES:
        raise PlanError(f"{out}: found the suffix {out.suffix or '(none)'}; expected .npz, arrays of numpy")
    teachers = tuple(open_named(found) for found, _ in recipe.found_teachers)
    _check_ranges(recipe, teachers)
    student, target = None, student_out or recipe.student_place(out)
    if recipe.found_student is not None and target is not None:
        student = open_found(recipe.found_student), target
        _check_classes(recipe, teachers, student[0])
    norms = all(any(name.endswith(STATISTICS) for name in each.source) for each in teachers)
    given = {key: recipe.file(key) is not None for key in FILES}
    records = given["stats"] or given["data"]
    present = {"batch_norm": norms or records, "records": records, "clusters": given["data"]}
    present |= {"proxy": given["images"], "wild": given["images"]}
    check_needs(recipe.row, present, student=student is not None)
    named = [(each.ref, each.source) for each in teachers]
    shape, pixels = shared_form(named, recipe.size, recipe.low, recipe.high)
    place = "cpu" if device is None else str(find_device(device))  # which needs torch
    return PlannedImages(recipe, out, teachers, student, shape, pixels, place)


def classes_of(model: Checkpoint) -> int:
    """How many classes a model has, by its config."""
    return labels_of(model.config) or CLASSES


def shared_form(
    models: Sequence[tuple[str, Checkpoint]], size: int | None, low: float | None, high: float | None
) -> tuple[Shape, tuple[float, float]]:
    """The shape of an image, and the range of its pixels, of models by name. Raises PlanError if they take others."""
    for _, source in models:
        sidecars_of(source)  # fetches the other files of a model on the Hub
    forms = [image_form(source, size, low, high) for _, source in models]
    for (name, _), form in zip(models, forms, strict=True):
        if form != forms[0]:
            raise PlanError(
                f"{name} takes images of {list(form[0])} with pixels from {form[1][0]:g} to {form[1][1]:g}, and "
                f"{models[0][0]} of {list(forms[0][0])} from {forms[0][1][0]:g} to {forms[0][1][1]:g}; expected the "
                "same. Give other teachers, or the size and the range"
            )
    return forms[0]


def _check_ranges(recipe: SynthesiseRecipe, teachers: tuple[ReadModel, ...]) -> None:
    """Raise PlanError for a teacher with another number of classes than the recipe says."""
    for each, (_, classes) in zip(teachers, recipe.found_teachers, strict=True):
        found = classes_of(each.source)
        if classes is not None and found != classes[1] - classes[0] + 1:
            expected = f"{classes[0]} to {classes[1]}"
            raise PlanError(f"{each.ref} has {found} classes; expected {expected}. Correct its `classes`")


def _check_classes(recipe: SynthesiseRecipe, teachers: tuple[ReadModel, ...], student: Checkpoint) -> None:
    """Raise PlanError if the student has another number of classes than the teachers together."""
    wanted, found = sum(classes_of(each.source) for each in teachers), classes_of(student)
    if wanted != found:
        who = "the teacher has" if len(teachers) == 1 else "the teachers have"
        raise PlanError(
            f"{who} {wanted} classes and the student {found}; expected as many. Make a student with them by "
            f"`mergekit-lfm head {recipe.student} --labels {wanted}`"
        )
