"""`meta_from_teachers`: from saved models without their data to an initialisation for tasks that are like theirs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.image_students import ImageStudent
from mergekit_lfm.api.merge import merge
from mergekit_lfm.api.meta_teachers_plans import PlannedInitialisation, plan_from_teachers
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.api.tune import check_training, writing_state
from mergekit_lfm.distill.passes import frozen
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.meta.black_box import BlackBox
from mergekit_lfm.meta.fusion import fuse
from mergekit_lfm.meta.losses import BESIDE, Inner
from mergekit_lfm.meta.pool import Pool, PoolEpisodes
from mergekit_lfm.meta.without_data import BiDf, Purer
from mergekit_lfm.output.card import CONFIG
from mergekit_lfm.output.request import result_of
from mergekit_lfm.output.save import save_checkpoint
from mergekit_lfm.recipe.adapters import join_reference
from mergekit_lfm.recipe.files import FoundModel
from mergekit_lfm.recipe.meta_teachers import TeachersRecipe
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.places import remove
from mergekit_lfm.train.examples import seed_of
from mergekit_lfm.train.loop import STATE, History, fit
from mergekit_lfm.train.losses import Loss
from mergekit_lfm.train.processes import current_group

MEAN = ".mean"  # the folder of the merge, in that of the state


@dataclass(frozen=True, slots=True)
class Initialised:
    """An initialisation from models without data. parameters: its numbers.

    steps: those done; loss: the mean over the last tenth of them, None without any. asked, requests: images that black
    boxes were asked about, and in how many requests; None where the teachers were open.
    """

    algorithm: str
    teachers: int
    parameters: int
    steps: int = 0
    loss: float | None = None
    asked: int | None = None
    requests: int | None = None


def meta_from_teachers(
    model: StrPath,
    teachers: Sequence[StrPath],
    out: StrPath,
    *,
    algorithm: str = "average",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    shots: int | None = None,
    queries: int | None = None,
    inner_steps: int | None = None,
    inner_rate: float | None = None,
    images: int | None = None,
    image_steps: int | None = None,
    image_rate: float | None = None,
    size: int | None = None,
    low: float | None = None,
    high: float | None = None,
    radius: float | None = None,
    curriculum: float | None = None,
    directions: int | None = None,
    seed: int = 0,
    device: str | None = None,
    memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Initialised]:
    """Make an initialisation for new tasks from models of other tasks, without data, and write it as a checkpoint.

    model: the architecture, and the weights to begin with; teachers: at least two. algorithm: "average", or "dro", of
    models with the same tensors; "purer", or "bidf", of classifiers of images with as many classes as `model`. A bidf
    teacher is asked for probabilities alone; the result counts how often. memory: a budget in bytes, which a step may
    need by its estimate, by default the machine's. The other settings are explained at `TeachersRecipe`; None stands
    for its defaults.

    A run that was killed goes on from the state in OUT.training. If `out` holds the result of the same request already,
    nothing is done. Raises PlanError for models that do not go together and settings that are not read, FormatError for
    damaged models, ImportError without transformers where models run.
    """
    given = {name: x for name, x in locals().items() if name in TeachersRecipe.model_fields and x is not None}
    given |= {"job": "meta", "model": os.fspath(model), "teachers": [os.fspath(x) for x in teachers]}
    recipe = TeachersRecipe.parse(given, label="meta")
    planned = plan_from_teachers(recipe, expand(out), device=device, memory=memory)
    return initialise_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


def initialise_planned(
    planned: PlannedInitialisation,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Initialised]:
    """Make a planned initialisation; as `meta_from_teachers` does."""
    started, request, findings = time.monotonic(), planned.request, list[str]()
    _ = request.digest  # of the inputs as they are before the work
    there = request.is_answered(planned.out, overwrite=overwrite)
    if not there:
        check_training(planned.training)
        planned.training.mkdir(parents=True, exist_ok=True)
        with writing_state(planned.training, current_group()), set_threads(threads):
            findings = _MAKERS[planned.recipe.algorithm](planned, progress, threads)
            (planned.training / STATE).unlink(missing_ok=True)
    result = Initialised(**result_of(planned.out, request.lock_file))
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(planned.out, result, request.digest, there, warnings, time.monotonic() - started)


def _average(planned: PlannedInitialisation, progress: Progress, threads: int | None) -> list[str]:
    """The mean by the engine's linear merge; the model gives the form and the other files, with weight 0."""
    place, recipe = planned.training / MEAN, planned.recipe
    weighted = [(recipe.found, 0.0), *((found, 1.0) for found in recipe.found_teachers)]
    models = [{"model": _text_of(found), "parameters": {"weight": weight}} for found, weight in weighted]
    if place.exists():
        remove(place)  # of a run that was killed after the merge
    document = {"merge_method": "linear", "models": models}
    merged = merge(document, place, threads=threads, card=False, progress=progress)
    (place / CONFIG).unlink(missing_ok=True)  # the merge's recipe, which is not that of the result
    findings = _save(planned, {}, Initialised("average", len(planned.teachers), planned.size), open_checkpoint(place))
    remove(place)
    return [*(str(warning) for warning in merged.warnings), *findings]


def _text_of(found: FoundModel) -> str:
    """A text that names the same model from any folder."""
    adapters = [(str(adapter.source), adapter.scale) for adapter in found.adapters]
    return join_reference(str(found.source), adapters)


def _fuse(planned: PlannedInitialisation, progress: Progress, threads: int | None) -> list[str]:  # noqa: ARG001
    """The weights that a network predicts for the mean embedding."""
    flat = torch.stack([_flat(each, planned.floats) for each in planned.teachers]).to(planned.device)
    with _showing(planned, progress) as how:
        found, history = fuse(flat, planned.recipe.radius, planned.recipe.options, **how)
    made, changed, first = found.cpu(), dict[str, Tensor](), 0
    for name in planned.floats:
        spec = planned.source[name]
        part = made[first : first + spec.numel].reshape(spec.shape)
        changed[name], first = round_once(part, getattr(torch, spec.dtype)).contiguous(), first + spec.numel
    return _save(planned, changed, _result(planned, history))


def _flat(model: Checkpoint, names: Sequence[str]) -> Tensor:
    return torch.cat([model.read(name).reshape(-1).float() for name in names])


def _from_images(planned: PlannedInitialisation, progress: Progress, threads: int | None) -> list[str]:  # noqa: ARG001
    """A model that learns from episodes of images, which are made for its teachers."""
    recipe = planned.recipe
    loaded = load_model(planned.source, "classification", device=planned.device)
    teachers = [load_model(each, "classification", device=planned.device).model for each in planned.teachers]
    for name, model in zip((recipe.model, *recipe.teachers), (loaded.model, *teachers), strict=True):
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise PlanError(f"{name} takes no images; expected a classifier of images. Give such a model")
    student, calls = ImageStudent(loaded), torch.zeros(2, dtype=torch.long)
    with frozen(teachers):
        loss, episodes = _lessons(planned, loaded, teachers, calls)
        with _showing(planned, progress) as how:
            history = fit(loaded.model, episodes, loss, recipe.options, **how)
    delattr(loaded.model, BESIDE)
    asked, requests = calls.tolist() if recipe.algorithm == "bidf" else (None, None)
    return _save(planned, student.changes(), _result(planned, history, asked, requests))


def _lessons(
    planned: PlannedInitialisation, loaded: Loaded, teachers: Sequence[Any], calls: Tensor
) -> tuple[Loss, PoolEpisodes]:
    """The loss over episodes of a pool of images, and the episodes. calls: counts what black boxes are asked."""
    config: Any = loaded.model.config
    recipe, classes = planned.recipe, int(config.num_labels)
    assert planned.form is not None
    shape, (low, high) = planned.form
    own = seed_of(recipe.seed, "images")
    pool = Pool(len(teachers), classes, recipe.count, shape, low, high, own).to(planned.device)
    inner, alone = Inner(recipe.inner_steps, recipe.inner_rate), recipe.algorithm == "bidf"
    sizes = (len(teachers), classes, recipe.count, recipe.shots, recipe.queries)
    episodes = PoolEpisodes(*sizes, alone, seed=recipe.seed)
    if alone:
        boxes, directions = [BlackBox(each, calls) for each in teachers], recipe.directions
        how: dict[str, Any] = {"directions": directions, "first": recipe.image_steps, "seed": recipe.seed}
        return BiDf(loaded.model, inner, boxes, pool, "pixel_values", **how), episodes
    how = {"curriculum": recipe.curriculum, "first": recipe.image_steps}
    return Purer(loaded.model, inner, teachers, pool, "pixel_values", **how), episodes


@contextmanager
def _showing(planned: PlannedInitialisation, progress: Progress) -> Iterator[dict[str, Any]]:
    """The arguments of `fit` that show a training, and keep its state."""
    with progress.by_step(" steps", "meta-learning") as report:
        yield {
            "place": planned.training,
            "request": planned.request.digest,
            "tell": lambda done, whole, line: report(done, whole, f"loss {line['loss']:.4g}"),
        }


def _result(
    planned: PlannedInitialisation, history: History, asked: int | None = None, requests: int | None = None
) -> Initialised:
    count, name = len(planned.teachers), planned.recipe.algorithm
    return Initialised(name, count, planned.size, history.steps, history.loss, asked, requests)


def _save(
    planned: PlannedInitialisation,
    changed: Mapping[str, Tensor],
    result: Initialised,
    source: Checkpoint | None = None,
) -> list[str]:
    """Write the result; returns findings. source: the checkpoint with the other tensors, by default the model."""
    request = planned.request
    left = save_checkpoint(
        source or planned.source,
        planned.out,
        changed,
        {"meta.json": (json.dumps(request.public, indent=2) + "\n").encode()},
        lock=lambda files, headers, tensors: {request.lock_file: request.lock(files, headers, tensors, asdict(result))},
    )
    return [f"{name} is left behind: {why}" for name, why in left.items()]


_MAKERS = {"average": _average, "dro": _fuse, "purer": _from_images, "bidf": _from_images}
