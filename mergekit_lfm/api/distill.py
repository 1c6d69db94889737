"""`distill_model`: train a saved model, the student, to follow others, its teachers."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.distill_plans import PlannedDistillation, labels_of, plan_distillation
from mergekit_lfm.api.judge import judge_data
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.tune import as_settings, tune_planned
from mergekit_lfm.api.tune_data import TuneData, read_all
from mergekit_lfm.api.tune_plans import ANSWERS
from mergekit_lfm.api.tune_results import Tuned
from mergekit_lfm.distill.follow import Follow
from mergekit_lfm.distill.teachers import NUMBER, PATTERN, Kept, Live, Reading, Teacher
from mergekit_lfm.distill.watch import show_attention
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.distill_recipe import DistillRecipe
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.train.examples import Change, Examples, seed_of
from mergekit_lfm.train.losses import Loss
from mergekit_lfm.train.processes import current_group
from mergekit_lfm.version import versions

# The number of a score that is compared, and whether more is better.
COMPARED: Mapping[str, tuple[str, bool]] = {
    "Perplexity": ("bits_per_byte", False),
    "Accuracy": ("accuracy", True),
    "Retrieval": ("top1", True),
    "TokenLoss": ("loss", False),
    "Fit": ("error", False),
}
Judge = Callable[[Loaded], Any]


def distill_model(
    student: StrPath,
    teachers: StrPath | Sequence[StrPath | Mapping[str, Any]],
    data: StrPath | Sequence[StrPath | Mapping[str, Any]],
    out: StrPath,
    *,
    task: str,
    loss: Mapping[str, float] | None = None,
    temperature: float | None = None,
    divergence: str | None = None,
    top_k: int | None = None,
    layers: Mapping[int, int] | None = None,
    cache: StrPath | bool | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **training: Any,
) -> Outcome[Tuned]:
    """Train a saved model, the student, to follow others, its teachers, on data; write it as `tune_model` does.

    student, teachers: folders, names on the Hub, or MODEL+ADAPTER; of teachers also {model, weight, classes}, with
    `classes` the first and the last of the student's that are the teacher's. data: as of `tune_model`; labels are
    needed for the terms `task` and `local`, and in `dev`, alone. loss: weights of terms; by default {"kd": 1}, for
    encoders {"embed": 1}. temperature: of kd and local, by default 2. divergence: "forward" (by default), "reverse" or
    "js". top_k: read so many of the largest scores, and the share of the rest. layers: the number of a hidden state of
    the student, and of the teacher's that it follows; by default evenly. cache: a folder to keep what the teachers say
    for other runs; False holds the teachers in memory, and asks them in each step, to the same bytes. training: the
    method, its parameters and all else that `tune_model` takes.

    The teachers are asked before the training, one after the other, and no two models are in memory at a time. With
    `dev`, a file, the result's facts say how the teachers, and the student before and after, do on it. Raises PlanError
    and the other errors of `tune_model`.
    """
    entries = [teachers] if isinstance(teachers, str | os.PathLike) else [*teachers]
    named = [dict(each) if isinstance(each, Mapping) else os.fspath(each) for each in entries]
    own = {"temperature": temperature, "divergence": divergence, "top_k": top_k, "layers": layers}
    own["cache"] = os.fspath(cache) if isinstance(cache, os.PathLike) else cache
    settings = {"model": student, "data": data, "task": task, "loss": loss, **training}
    recipe = {**as_settings(settings), "job": "distill", "teachers": named}
    recipe |= {name: value for name, value in own.items() if value is not None}
    planned = plan_distillation(DistillRecipe.parse(recipe, label="distill"), expand(out), device=device)
    return tune_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


@dataclass
class Taught:
    """What the teachers say about the data of a training.

    scores: of each teacher on the development set, by its name; judge: what gives such a score, None without a file.
    """

    planned: PlannedDistillation
    teachers: Sequence[Teacher]
    scores: Mapping[str, Any]
    judge: Judge | None = None
    before: Any = None

    def begin(self, loaded: Loaded, examples: Examples) -> tuple[Examples, Loss]:
        """The examples with their numbers, and the loss of the student by its teachers.

        What is trained beside the student becomes a part of the model.
        """
        recipe, model = self.planned.distillation, loaded.model
        numbered = [{**item, NUMBER: torch.tensor(number)} for number, item in enumerate(examples.items)]
        examples = replace(examples, items=numbered, change=None if examples.change is None else _Keep(examples.change))
        follow, device, options = (
            Follow(self.planned.course, self.teachers),
            next(model.parameters()).device,
            recipe.options,
        )
        first = examples.step(0, options.batch_size, options.seed)[: max(2, len(self.teachers))]
        batch = {name: x.to(device) for name, x in examples.batch(first).items()}
        follow.build(model, batch, seed_of(options.seed, "beside"))
        self.before = None if self.judge is None else self.judge(loaded)
        return examples, follow

    def end(self, loaded: Loaded) -> dict[str, Any]:
        """How the teachers, and the student before and after, do on the development set; nothing without its file."""
        if self.judge is None:
            return {}
        after = self.judge(loaded)
        return {
            "teachers": {name: asdict(score) for name, score in self.scores.items()},
            "before": asdict(self.before),
            "after": asdict(after),
            "recovered": recovered([*self.scores.values()], self.before, after),
        }

    def clear(self) -> None:
        """Remove what was kept for this training alone."""
        folder = self.planned.training / ANSWERS
        for place in [*folder.glob("*"), folder]:
            for file in place.glob(PATTERN):
                file.unlink()
            with suppress(OSError):
                place.rmdir()


def recovered(teachers: Sequence[Any], before: Any, after: Any) -> float | None:
    """The share of what a student lacked to the best of its teachers that came back; None if it lacked nothing."""
    name, more = COMPARED[type(before).__name__]
    sign = 1 if more else -1
    best, first, last = (sign * x for x in (_best(teachers, name, sign), getattr(before, name), getattr(after, name)))
    return (last - first) / (best - first) if best > first else None


def _best(scores: Sequence[Any], name: str, sign: int) -> float:
    return float(max((getattr(score, name) for score in scores), key=lambda number: sign * number))


@dataclass(frozen=True)
class _Keep:
    """A change of examples that leaves their numbers."""

    change: Change

    def __call__(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        rest = {name: x for name, x in item.items() if name != NUMBER}
        return {**self.change(rest, generator), NUMBER: item[NUMBER]}


def learn(planned: PlannedDistillation, data: TuneData, progress: Progress) -> Taught:
    """Ask the teachers about the examples that the training will use, and judge them; one is in memory at a time.

    Without a cache they stay in memory, and are asked in each step. Raises PlanError for a teacher that reads the data
    in another way than the student.
    """
    recipe, options = planned.distillation, planned.recipe.options
    if recipe.is_cached and current_group().count > 1:
        raise PlanError("several processes ask the teachers in each step; set cache to false (--no-cache)")
    numbers = sorted({i for k in range(options.steps) for i in data.examples.step(k, options.batch_size, options.seed)})
    judge = None if recipe.dev_file is None else judge_data(recipe.dev_file.path, recipe.task, recipe.window, None)
    teachers, scores = list[Teacher](), dict[str, Any]()
    for number, (entry, source) in enumerate(zip(recipe.teachers, planned.teachers, strict=True)):
        loaded = load_model(source, recipe.task, device=planned.device)
        _check_reading(entry.model, planned, data, read_all(loaded, planned, fits=False))
        if judge is not None and entry.classes is None and _has_labels_of(planned, number):
            scores[entry.model] = judge(loaded)
        temperature = 1.0 if recipe.top_k is None else recipe.temperature
        reading = Reading(recipe.task, planned.course.wanted(number), recipe.top_k, temperature)
        teachers.append(_ask(planned, number, loaded, reading, data.examples, numbers, progress))
        del loaded
        gc.collect()
    return Taught(planned, teachers, scores, judge if scores else None)


def _ask(
    planned: PlannedDistillation,
    number: int,
    loaded: Loaded,
    reading: Reading,
    examples: Examples,
    numbers: Sequence[int],
    progress: Progress,
) -> Teacher:
    """A teacher that stays in memory, or what it says about the examples."""
    if reading.wanted.attentions:
        show_attention(loaded.model)
    if not planned.distillation.is_cached:
        return Live(loaded.model, reading)
    facts = [planned.teachers[number].content, examples.digest, repr(reading), planned.device.partition(":")[0]]
    key = xxhash.xxh3_128_hexdigest(json.dumps([*facts, versions("torch")]).encode())
    kept = Kept(planned.answers / key, key, torch.device(planned.device))
    with progress.by_count(" examples", f"asking {planned.distillation.teachers[number].model}") as tell:
        kept.fill(loaded.model, reading, examples, numbers, tell)
    return kept


def _has_labels_of(planned: PlannedDistillation, number: int) -> bool:
    """Whether a teacher has the student's classes, so that it is judged on the same data."""
    models = (planned.source, planned.teachers[number])
    return planned.recipe.task != "classification" or len({labels_of(model.config) for model in models}) == 1


def _check_reading(teacher: str, planned: PlannedDistillation, mine: TuneData, theirs: TuneData) -> None:
    """Raise PlanError if a teacher reads the examples in another way: by another tokenizer, or image processor."""
    student, own, other = planned.recipe.model, mine.examples, theirs.examples
    if repr(own.change) != repr(other.change):
        found = f"{teacher} and {student} prepare their inputs in different ways"
        raise PlanError(f"{found}; expected the same mask, or image processor. Choose a student with the teacher's")
    pairs = [*zip(own.items, other.items, strict=False)]
    wrong = next((i for i, (a, b) in enumerate(pairs) if not _is_same(a, b)), None)
    if wrong is None and len(own) == len(other):
        return
    found = f"{teacher} and {student} read the data in different ways, first in example {wrong or 0}"
    raise PlanError(
        f"{found}; expected the same tokenizer, and as long texts (`window`). Choose a student of the teacher's "
        "family, or let the teacher write texts (`mergekit-lfm generate`) and tune on them"
    )


def _is_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two examples have the same inputs; labels and positives may be one's own."""
    return all(name in mine and torch.equal(mine[name], x) for name, x in theirs.items() if name != "labels")
