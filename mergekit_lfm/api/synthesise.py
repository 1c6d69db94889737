"""`synthesise_images`: images for a saved classifier without its data, and a student that learns from them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.image_students import ImageStudent
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.api.synthesise_plans import PlannedImages, plan_synthesis
from mergekit_lfm.api.tune import check_training
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.metadata import collect_records, find_clusters, read_records
from mergekit_lfm.distill.passes import Moments, scores_in_parts
from mergekit_lfm.distill.samples import draw_grid, encode_samples
from mergekit_lfm.distill.synthesise import Given, Synthesis, synthesise
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.file_request import check_lock_beside, lock_beside, read_lock_beside
from mergekit_lfm.recipe.synthesise_recipe import DEFAULT, JOB, SynthesiseRecipe
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.subject import make_subject
from mergekit_lfm.store.durable import replace_file, sync_folder
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.train.loop import STATE
from mergekit_lfm.train.state import METRICS
from mergekit_lfm.version import versions

if TYPE_CHECKING:
    pass

PART = 128  # images that are scored at once


@dataclass(frozen=True, slots=True)
class Synthesised:
    """Images without data. shape: of each, channels, height and width. files: those written.

    sureness: the teacher's mean probability of the class that it scores best. student: where it was written, None
    without one; agreement: the share of the images to which it gives the teacher's class.
    """

    preset: str
    count: int
    shape: tuple[int, int, int]
    files: tuple[Path, ...]
    sureness: float
    student: Path | None = None
    agreement: float | None = None


def synthesise_images(
    teachers: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    preset: str = DEFAULT,
    student: StrPath | None = None,
    student_out: StrPath | None = None,
    stats: StrPath | None = None,
    data: StrPath | None = None,
    images: StrPath | None = None,
    size: int | None = None,
    low: float | None = None,
    high: float | None = None,
    count: int | None = None,
    steps: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Synthesised]:
    """Make images for a saved classifier of images by a preset, and write them to `out`, an .npz file.

    Images of 1 or 3 channels are drawn in a .png beside it, too.

    teachers: one classifier, or several of other classes each, which then are numbered on, for presets that take some.
    student: another classifier, of all these classes, which learns from the images, and is written to `student_out`, by
    default beside the images under their name with -student; all models stay as they are. stats: a file of Gram
    matrices of the teacher; data: an .npz file of some of its images, for records and clusters; images: one of images
    of any kind. size: height and width, by default those of the model's config or image processor; low, high: the range
    of pixels, by default the processor's, else 0 to 1. count: how many images gradients make or are chosen, by default
    256. steps: of a student on these, by default 1,200; rounds: of a generator, or steps of gradients for each batch of
    images; by default the preset's. threads: how many torch uses.

    A run that was killed goes on from its state in OUT.training to the same bytes. If `out` and `student_out` hold the
    result of the same request already, which OUT.lock.json says, nothing is done. The outcome's digest is that of the
    request. Raises PlanError for all that a preset needs and is not given, or is given and does not read, and for
    models that do not go together; FormatError for files of something else; ImportError without transformers or Pillow.
    """
    settings = {name: value for name, value in locals().items() if name in SynthesiseRecipe.model_fields}
    named = [teachers] if isinstance(teachers, str | os.PathLike) else teachers
    paths: dict[str, Any] = {key: os.fspath(x) for key, x in settings.items() if isinstance(x, os.PathLike)}
    paths["teachers"] = [os.fspath(x) for x in named]
    recipe = SynthesiseRecipe.parse({"job": JOB, **settings, **paths})
    place = None if student_out is None else expand(student_out)
    planned = plan_synthesis(recipe, expand(out), device=device, student_out=place)
    return make_planned_images(planned, threads=threads, overwrite=overwrite, progress=progress)


def make_planned_images(
    planned: PlannedImages, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Synthesised]:
    """Make planned images; as `synthesise_images` does."""
    started, request, out, findings = time.monotonic(), planned.request, planned.out, list[str]()
    there = request.is_answered(out, overwrite=overwrite)
    if there:
        result = _known(planned)
    else:
        check_lock_beside(out, JOB)
        check_training(planned.training)
        if planned.picture is not None:
            import_extra("PIL.Image", "drawing images", "images")
        planned.training.mkdir(parents=True, exist_ok=True)
        try:
            with lock_folder(planned.training), set_threads(threads):
                result, findings = _make(planned, overwrite, progress)
                for name in (STATE, METRICS):
                    (planned.training / name).unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # the state of a run that was interrupted is in it
                planned.training.rmdir()
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(out, result, request.request.digest, there, warnings, time.monotonic() - started)


def _known(planned: PlannedImages) -> Synthesised:
    """The result that an earlier run has left."""
    facts = read_lock_beside(planned.out, JOB)["result"]
    return Synthesised(**{**facts, "shape": tuple(facts["shape"])}, **_places(planned))


def _places(planned: PlannedImages) -> dict[str, Any]:
    files = (planned.out, *([] if planned.picture is None else [planned.picture]))
    return {"files": files, "student": None if planned.student is None else planned.student[1]}


def _make(planned: PlannedImages, overwrite: bool, progress: Progress) -> tuple[Synthesised, list[str]]:
    """Make the images, train the student, and write both; also findings."""
    recipe, request, findings = planned.recipe, planned.request, list[str]()
    loaded = [each.load("classification", planned.device) for each in planned.teachers]
    student = None
    if planned.student is not None:
        student = ImageStudent(load_model(planned.student[0], "classification", device=planned.device))
    _check_images([*loaded, *([] if student is None else [student.loaded])])
    given = _given(loaded[0], recipe, planned.shape)
    made = _synthesise(planned, loaded, student, given, progress)
    request.request.check_unchanged()
    facts = _describe(recipe.preset, made, student)
    content = encode_samples(made.samples)
    lock = {"job": JOB, "request": request.request.digest, "recipe": request.request.public}
    lock |= {"versions": versions("torch"), "result": facts, "content": xxhash.xxh3_128_hexdigest(content)}
    replace_file(lock_beside(planned.out), (json.dumps(lock, indent=2) + "\n").encode())
    replace_file(planned.out, content)
    if planned.picture is not None:
        replace_file(planned.picture, draw_grid(made.samples))
    sync_folder(planned.out.parent)
    if student is not None and not request.is_learned(overwrite=overwrite):
        findings = student.write(planned, facts)
    return Synthesised(**facts, **_places(planned)), findings


def _synthesise(
    planned: PlannedImages, loaded: Sequence[Loaded], student: ImageStudent | None, given: Given, progress: Progress
) -> Synthesis:
    """The images; the student is trained in place."""
    recipe, row = planned.recipe, planned.recipe.row
    pixels = row.family == "pixels"
    longer = {} if recipe.rounds is None else {"steps" if pixels else "rounds": recipe.rounds}
    with progress.by_count(" steps" if pixels else " rounds", "making images") as report:
        return synthesise(
            [each.model for each in loaded] if len(loaded) > 1 else loaded[0].model,
            None if student is None else student.loaded.model,
            row,
            planned.shape,
            given=given,
            count=recipe.count,
            student_steps=recipe.steps,
            low=planned.pixels[0],
            high=planned.pixels[1],
            seed=recipe.seed,
            tell=lambda done, whole, _: report(done, whole),
            making=Making(planned.training, planned.request.request.digest),
            **{"inversion" if pixels else "generation": longer},
        )


def _check_images(loaded: Sequence[Loaded]) -> None:
    """Raise PlanError if a model takes no images."""
    for each in loaded:
        if getattr(each.model, "main_input_name", "") != "pixel_values":
            raise PlanError(
                f"{each.checkpoint.path} takes no images; expected a classifier of images. Give such a model"
            )


def _given(loaded: Loaded, recipe: SynthesiseRecipe, shape: tuple[int, int, int]) -> Given:
    """The facts that a user has besides the teacher, as far as the preset reads them."""
    teacher, row, records, clusters = loaded.model, recipe.row, None, None
    stats, data, images = (recipe.file(key) for key in ("stats", "data", "images"))
    own = None if data is None else _pixels(data, shape, loaded)
    if "records" in row.terms or ("bn" in row.terms and not batchnorms(teacher)):
        if stats is not None:
            records = _read_records(stats, loaded)
        elif own is not None:
            records = collect_records(teacher, own)
    if "clusters" in row.terms and own is not None:
        clusters = find_clusters(teacher, own)
    return Given(records, clusters, None if images is None else _pixels(images, shape, loaded))


def _read_records(path: Path, loaded: Loaded) -> dict[str, Moments]:
    """Records from a file of Gram matrices of the model."""
    statistics, subject = open_statistics(path), make_subject(loaded.model, loaded.checkpoint)
    if statistics.info.models != (subject.digest,):
        raise FormatError(
            f"{statistics.path} holds no statistics of this model; collect them with `mergekit-lfm stats`"
        )
    return read_records(statistics, loaded.model, subject.tensors)


def _pixels(path: Path, shape: tuple[int, int, int], loaded: Loaded) -> Tensor:
    """The images in an .npz file, on the model's device. Raises FormatError for those of another shape."""
    batches = read_data(path, "classification", batch_size=PART)
    found = [next(iter((*batch.args, *batch.kwargs.values()))) for batch in batches]
    if tuple(found[0].shape[1:]) != shape:
        raise FormatError(f"{path} has images of {list(found[0].shape[1:])}; expected {list(shape)}, the teacher's")
    return torch.cat(found).to(next(loaded.model.parameters()).device, torch.float32)


def _describe(preset: str, made: Synthesis, student: ImageStudent | None) -> dict[str, Any]:
    """The facts about a result, but for its places."""
    samples, agreement = made.samples, None
    if student is not None:
        says = scores_in_parts(student.loaded.model, samples.images, PART).argmax(-1)
        agreement = float((says == samples.labels).float().mean())
    sureness = float(samples.scores.softmax(-1).amax(-1).mean())
    shape = tuple(samples.images.shape[1:])
    return {
        "preset": preset,
        "count": len(samples.images),
        "shape": shape,
        "sureness": sureness,
        "agreement": agreement,
    }
