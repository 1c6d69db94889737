"""`synthesise_images`: images for a saved classifier without its data, and a student that learns from them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.tune_results import changes_of
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.distill.metadata import collect_records, find_clusters, read_records
from mergekit_lfm.distill.passes import scores_in_parts
from mergekit_lfm.distill.presets import Preset, find_preset
from mergekit_lfm.distill.samples import save_samples
from mergekit_lfm.distill.synthesise import Given, Synthesis, synthesise
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.save import check_out, save_checkpoint
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.processors import IMAGES
from mergekit_lfm.runtime.subject import Subject, make_subject
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.places import check_file, check_outside
from mergekit_lfm.views.adapted import with_adapters

if TYPE_CHECKING:
    from mergekit_lfm.store.checkpoint import Checkpoint

SIDES = (("height", "width"), ("shortest_edge", "shortest_edge"))  # of an image processor's size, by names
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
    teacher: StrPath,
    out: StrPath,
    *,
    preset: str = "deepinversion",
    student: StrPath | None = None,
    student_out: StrPath | None = None,
    stats: StrPath | None = None,
    data: StrPath | None = None,
    images: StrPath | None = None,
    size: int | None = None,
    low: float | None = None,
    high: float | None = None,
    count: int = 256,
    steps: int = 1200,
    rounds: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Synthesised]:
    """Make images for a saved classifier of images by a preset, and write them to `out`, an .npz file, and as a .png.

    student: another classifier of the same classes, which learns from the images, and is written to `student_out`; both
    stay as they are. stats: a file of Gram matrices of the teacher; data: an .npz file of some of its images, for
    records and clusters; images: one of images of any kind. size: height and width, by default those of the model's
    config or image processor; low, high: the range of pixels, by default the processor's, else 0 to 1. count: how many
    images gradients make. steps: of a student on these; rounds: of a generator, or steps of gradients for each batch of
    images; by default the preset's.

    Raises PlanError for all that a preset needs and is not given, and for models that do not go together; FormatError
    for files of something else; ImportError without transformers or Pillow.
    """
    started = time.monotonic()
    row, place, target = find_preset(preset), expand(out), None if student_out is None else expand(student_out)
    import_extra("PIL.Image", "drawing images", "images")
    files = [expand(each, "data") for each in (stats, data, images) if each is not None]
    folders = [model_folder(each) for each in (teacher, student) if each is not None]
    _check(place, target, student is not None, count=count, steps=steps, rounds=rounds)
    check_file(place, [*files, *folders], overwrite=overwrite)
    check_file(place.with_suffix(".png"), [*files, *folders], overwrite=overwrite)
    if target is not None:
        check_out(target, {str(path): path for path in (*files, *folders)}, overwrite=overwrite)
        check_outside(place, [target])
    made, learned = _make(
        folders, row, (stats, data, images), (size, low, high), (count, steps, rounds), seed, device, progress
    )
    written, findings = tuple(save_samples(place, made.samples)), list[str]()
    if target is not None and learned is not None:
        findings = _write_student(*learned, target, row.name, seed)
    result = _describe(row.name, made, written, learned and learned[0], target)
    return Outcome(place, result, warnings=warn_of(findings), seconds=time.monotonic() - started)


def _make(
    folders: Sequence[Path],
    row: Preset,
    files: tuple[StrPath | None, StrPath | None, StrPath | None],
    form: tuple[int | None, float | None, float | None],
    numbers: tuple[int, int, int | None],
    seed: int,
    device: str,
    progress: Progress,
) -> tuple[Synthesis, tuple[Loaded, Subject] | None]:
    """The images, and the trained student if there is one. folders: the teacher's, and perhaps the student's."""
    (size, low, high), (count, steps, rounds) = form, numbers
    loaded = [load_model(with_adapters(folder), "classification", device=device) for folder in folders]
    _check_classes(loaded)
    subjects = [make_subject(each.model, each.checkpoint) for each in loaded]  # as they are before the training
    _ = [subject.names for subject in subjects]
    shape, bounds = _form(loaded[0], size, low, high)
    given = _given(loaded[0], subjects[0], *files, shape)
    pixels = row.family == "pixels"
    longer = {} if rounds is None else {"steps" if pixels else "rounds": rounds}
    with progress.by_count(" steps" if pixels else " rounds", "making images") as report:
        made = synthesise(
            loaded[0].model,
            loaded[1].model if len(loaded) > 1 else None,
            row,
            shape,
            given=given,
            count=count,
            student_steps=steps,
            low=bounds[0],
            high=bounds[1],
            seed=seed,
            tell=lambda done, whole, _: report(done, whole),
            **{"inversion" if pixels else "generation": longer},
        )
    return made, (loaded[1], subjects[1]) if len(loaded) > 1 else None


def _check(out: Path, target: Path | None, student: bool, *, count: int, steps: int, rounds: int | None) -> None:
    """Raise PlanError for arguments out of range, with all of them."""
    problems = [] if out.suffix == ".npz" else [f"{out}: found the suffix {out.suffix or '(none)'}; expected .npz"]
    if student != (target is not None):
        given, lacking = ("a student", "a place to write it") if student else ("a place for a student", "a student")
        problems.append(f"found {given} without {lacking}; give both or neither")
    for name, value, least in (("count", count, 2), ("steps", steps, 1), ("rounds", rounds, 1)):
        if value is not None and value < least:
            problems.append(f"{name} is {value}; expected at least {least}")
    if problems:
        raise PlanError("; ".join(problems))


def _check_classes(loaded: list[Loaded]) -> None:
    """Raise PlanError if a model takes no images, or the models differ in their number of classes."""
    for each in loaded:
        if getattr(each.model, "main_input_name", "") != "pixel_values":
            raise PlanError(
                f"{each.checkpoint.path} takes no images; expected a classifier of images. Give such a model"
            )
    numbers = [each.model.config.num_labels for each in loaded]  # type: ignore[union-attr]
    if len({*numbers}) > 1:
        raise PlanError(
            f"the teacher has {numbers[0]} classes and the student {numbers[1]}; expected as many. Give others"
        )


def _form(
    loaded: Loaded, size: int | None, low: float | None, high: float | None
) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """The shape of an image, and the range of its pixels, as the model takes them."""
    config: Any = loaded.model.config
    file = loaded.checkpoint.path / IMAGES
    processor: Mapping[str, Any] = json.loads(read_text(file)) if file.is_file() else {}
    sides = _sides(size or getattr(config, "image_size", None) or processor.get("crop_size") or processor.get("size"))
    if sides is None:
        raise PlanError(f"{loaded.checkpoint.path} does not say how large its images are; give the size")
    means, spreads = (processor.get(name) or [default] for name, default in (("image_mean", 0.0), ("image_std", 1.0)))
    least = min(-mean / spread for mean, spread in zip(means, spreads, strict=True))
    most = max((1 - mean) / spread for mean, spread in zip(means, spreads, strict=True))
    bounds = (least if low is None else low, most if high is None else high)
    if not (math.isfinite(bounds[0]) and bounds[0] < bounds[1] < math.inf):
        raise PlanError(f"low is {bounds[0]:g} and high {bounds[1]:g}; expected a range of pixels. Correct them")
    return (int(getattr(config, "num_channels", 3)), *sides), bounds


def _sides(size: Any) -> tuple[int, int] | None:
    """The height and width in a number, a pair, or an image processor's size; None for another form."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        found = next(((size[a], size[b]) for a, b in SIDES if a in size and b in size), None)
        return found and (int(found[0]), int(found[1]))
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _given(
    loaded: Loaded,
    subject: Subject,
    stats: StrPath | None,
    data: StrPath | None,
    images: StrPath | None,
    shape: tuple[int, int, int],
) -> Given:
    """The facts that a user has besides the teacher."""
    own = None if data is None else _pixels(expand(data, "data"), shape, loaded)
    records = None if own is None else collect_records(loaded.model, own)
    if stats is not None:
        statistics = open_statistics(expand(stats, "statistics"))
        if statistics.info.models != (subject.digest,):
            raise FormatError(
                f"{statistics.path} holds no statistics of this model; collect them with `mergekit-lfm stats`"
            )
        records = read_records(statistics, loaded.model)
    clusters = None if own is None else find_clusters(loaded.model, own)
    return Given(records, clusters, None if images is None else _pixels(expand(images, "images"), shape, loaded))


def _pixels(path: Path, shape: tuple[int, int, int], loaded: Loaded) -> Tensor:
    """The images in an .npz file, on the model's device. Raises FormatError for those of another shape."""
    batches = read_data(path, "classification", batch_size=PART)
    found = [next(iter((*batch.args, *batch.kwargs.values()))) for batch in batches]
    if tuple(found[0].shape[1:]) != shape:
        raise FormatError(f"{path} has images of {list(found[0].shape[1:])}; expected {list(shape)}, the teacher's")
    return torch.cat(found).to(next(loaded.model.parameters()).device, torch.float32)


def _write_student(loaded: Loaded, subject: Subject, out: Path, preset: str, seed: int) -> list[str]:
    """Write the student with its new parameters and BatchNorm's new statistics; returns findings."""
    source = loaded.checkpoint
    changed = changes_of(subject, source) | _buffers(loaded, source)
    document = json.dumps({"preset": preset, "seed": seed}, indent=2) + "\n"
    left = save_checkpoint(source, out, changed, {"synthesise.json": document.encode()})
    return [f"{name} is left behind: {why}" for name, why in left.items()]


def _buffers(loaded: Loaded, source: Checkpoint) -> dict[str, Tensor]:
    """The buffers that the checkpoint holds, in its dtypes."""
    held = {name: x for name, x in loaded.model.named_buffers() if name in source}
    return {name: x.detach().cpu().to(getattr(torch, source[name].dtype)) for name, x in held.items()}


def _describe(
    preset: str, made: Synthesis, files: tuple[Path, ...], student: Loaded | None, target: Path | None
) -> Synthesised:
    samples = made.samples
    channels, height, width = samples.images.shape[1:]
    sureness = float(samples.scores.softmax(-1).amax(-1).mean())
    agreement = None
    if student is not None:
        says = scores_in_parts(student.model, samples.images, PART).argmax(-1)
        agreement = float((says == samples.labels).float().mean())
    return Synthesised(preset, len(samples.images), (channels, height, width), files, sureness, target, agreement)
