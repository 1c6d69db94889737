"""`synthesise_images`: images for a saved classifier without its data, and a student that learns from them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.image_forms import image_form
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.tune_results import changes_of
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.distill.metadata import collect_records, find_clusters, read_records
from mergekit_lfm.distill.passes import Moments, scores_in_parts
from mergekit_lfm.recipe.synthesise_presets import Family, Preset, find_preset
from mergekit_lfm.distill.samples import DRAWN, save_samples
from mergekit_lfm.distill.synthesise import Given, Synthesis, synthesise
from mergekit_lfm.errors import FormatError, PlanError, shorten
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.save import check_out, save_checkpoint
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.subject import Subject, make_subject
from mergekit_lfm.store.places import check_file, check_outside
from mergekit_lfm.views.adapted import with_adapters

if TYPE_CHECKING:
    from mergekit_lfm.store.checkpoint import Checkpoint

PART = 128  # images that are scored at once
# Arguments that a family does not read.
UNREAD: Mapping[Family, tuple[str, ...]] = {"pixels": (), "generator": ("count", "steps"), "wild": ("rounds",)}
# Files, and the needs of a preset that they serve.
SERVED = {
    "stats": {"batch_norm", "records"},
    "data": {"batch_norm", "records", "clusters"},
    "images": {"proxy", "wild"},
}


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
    count: int | None = None,
    steps: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Synthesised]:
    """Make images for a saved classifier of images by a preset, and write them to `out`, an .npz file.

    Images of 1 or 3 channels are drawn in a .png beside it, too.

    student: another classifier of the same classes, which learns from the images, and is written to `student_out`; both
    stay as they are. stats: a file of Gram matrices of the teacher; data: an .npz file of some of its images, for
    records and clusters; images: one of images of any kind. size: height and width, by default those of the model's
    config or image processor; low, high: the range of pixels, by default the processor's, else 0 to 1. count: how many
    images gradients make or are chosen, by default 256. steps: of a student on these, by default 1,200; rounds: of a
    generator, or steps of gradients for each batch of images; by default the preset's.

    Raises PlanError for all that a preset needs and is not given, or is given and does not read, and for models that do
    not go together; FormatError for files of something else; ImportError without transformers or Pillow.
    """
    started = time.monotonic()
    row, place, target = find_preset(preset), expand(out), None if student_out is None else expand(student_out)
    files = [expand(each, "data") for each in (stats, data, images) if each is not None]
    folders = [model_folder(each) for each in (teacher, student) if each is not None]
    read = {"stats": stats, "data": data, "images": images}
    numbers = {"size": size, "count": count, "steps": steps, "rounds": rounds}
    _check(row, place, target, student is not None, [name for name, file in read.items() if file is not None], numbers)
    check_file(place, [*files, *folders], overwrite=overwrite)
    if target is not None:
        check_out(target, {str(path): path for path in (*files, *folders)}, overwrite=overwrite)
        check_outside(place, [target])
    loaded = [load_model(with_adapters(folder), "classification", device=device) for folder in folders]
    _check_classes(loaded)
    shape, bounds = image_form(loaded[0], size, low, high)
    if shape[0] in DRAWN:
        import_extra("PIL.Image", "drawing images", "images")
        check_file(place.with_suffix(".png"), [*files, *folders], overwrite=overwrite)
    learner = _Student(loaded[1]) if target is not None else None  # as it is before the training
    given = _given(loaded[0], row, stats, data, images, shape)
    made = _make(loaded, row, shape, bounds, given, (count, steps, rounds), seed, progress)
    written, findings = tuple(save_samples(place, made.samples)), list[str]()
    if target is not None and learner is not None:
        findings = learner.write(target, row.name, seed)
    result = _describe(row.name, made, written, None if learner is None else learner.loaded, target)
    return Outcome(place, result, warnings=warn_of(findings), seconds=time.monotonic() - started)


def _make(
    loaded: Sequence[Loaded],
    row: Preset,
    shape: tuple[int, int, int],
    bounds: tuple[float, float],
    given: Given,
    numbers: tuple[int | None, int | None, int | None],
    seed: int,
    progress: Progress,
) -> Synthesis:
    """The images; the student is trained in place. loaded: the teacher, and perhaps the student."""
    count, steps, rounds = numbers
    pixels = row.family == "pixels"
    longer = {} if rounds is None else {"steps" if pixels else "rounds": rounds}
    with progress.by_count(" steps" if pixels else " rounds", "making images") as report:
        return synthesise(
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


def _check(
    row: Preset, out: Path, target: Path | None, student: bool, files: list[str], numbers: Mapping[str, int | None]
) -> None:
    """Raise PlanError for arguments out of range, and those that are not read, with all of them."""
    problems = [] if out.suffix == ".npz" else [f"{out}: found the suffix {out.suffix or '(none)'}; expected .npz"]
    if student != (target is not None):
        given, lacking = ("a student", "a place to write it") if student else ("a place for a student", "a student")
        problems.append(f"found {given} without {lacking}; give both or neither")
    least = {"count": 2, "size": 1, "steps": 1, "rounds": 1}
    present = {name: value for name, value in numbers.items() if value is not None}
    problems += [f"{name} is {x}; expected at least {least[name]}" for name, x in present.items() if x < least[name]]
    unread = [name for name in present if name in UNREAD[row.family]]
    unread += [name for name in files if not SERVED[name].intersection(row.needs)]
    if unread:
        problems.append(f"{row.name} does not read {' and '.join(unread)}; leave that out")
    elif "steps" in present and not student:
        problems.append("found steps of a student without a student; give one, or leave them out")
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


def _given(
    loaded: Loaded,
    row: Preset,
    stats: StrPath | None,
    data: StrPath | None,
    images: StrPath | None,
    shape: tuple[int, int, int],
) -> Given:
    """The facts that a user has besides the teacher, as far as the preset reads them."""
    teacher, records, clusters = loaded.model, None, None
    own = None if data is None else _pixels(expand(data, "data"), shape, loaded)
    if "records" in row.terms or ("bn" in row.terms and not batchnorms(teacher)):
        if stats is not None:
            records = _read_records(expand(stats, "statistics"), loaded)
        elif own is not None:
            records = collect_records(teacher, own)
    if "clusters" in row.terms and own is not None:
        clusters = find_clusters(teacher, own)
    return Given(records, clusters, None if images is None else _pixels(expand(images, "images"), shape, loaded))


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


class _Student:
    """A model that will be trained, and the tensor of its checkpoint for each parameter and buffer.

    Raises PlanError, before the training, if some of them would be lost because no tensor holds them.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.source = loaded, loaded.checkpoint
        self.subject = make_subject(loaded.model, loaded.checkpoint)
        self.buffers = _buffer_tensors(self.subject, self.source)
        statistics = {f"{name}.{x}" for name in batchnorms(loaded.model) for x in ("running_mean", "running_var")}
        lost = [names[0] for names in self.subject.names.values() if not {*names} & self.subject.tensors.keys()]
        lost += sorted(statistics - self.buffers.keys())
        if lost:
            raise PlanError(
                f"no tensor of {self.source.path} is known to hold {shorten(lost, 5)} of the student; expected one for "
                "each, where it goes after the training. Save the model again by transformers, and give that"
            )

    def write(self, out: Path, preset: str, seed: int) -> list[str]:
        """Write the student with its new parameters and BatchNorm's new statistics; returns findings."""
        values, changed = dict(self.loaded.model.named_buffers()), changes_of(self.subject, self.source)
        for name, tensor in self.buffers.items():
            changed[tensor] = values[name].detach().cpu().to(getattr(torch, self.source[tensor].dtype))
        document = json.dumps({"preset": preset, "seed": seed}, indent=2) + "\n"
        left = save_checkpoint(self.source, out, changed, {"synthesise.json": document.encode()})
        return [f"{name} is left behind: {why}" for name, why in left.items()]


def _buffer_tensors(subject: Subject, source: Checkpoint) -> dict[str, str]:
    """The tensor of each buffer that the checkpoint holds: beside that of a parameter of the same module."""
    homes = {name.rpartition(".")[0]: tensor.rpartition(".")[0] for name, tensor in subject.tensors.items()}
    found = dict[str, str]()
    for name, _ in subject.module.named_buffers():
        home, _, last = name.rpartition(".")
        tensor = f"{homes[home]}.{last}" if home in homes else name
        if tensor in source:
            found[name] = tensor
    return found


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
