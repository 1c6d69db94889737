"""The lessons of teachers: their answers about the data of a training, and the scores of teachers and student."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergekit_lfm.api.judge import judge_data
from mergekit_lfm.api.tune_data import read_all
from mergekit_lfm.api.tune_plans import ANSWERS, PlannedTuning
from mergekit_lfm.distill.course import Course, labels_of
from mergekit_lfm.distill.follow import Follow
from mergekit_lfm.distill.spans import pair_places, target_places
from mergekit_lfm.distill.teachers import NUMBER, PATTERN, Kept, Live, Reading, Teacher
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.recipe.distill_recipe import DistillRecipe
from mergekit_lfm.runtime.functional import use_plain_attention
from mergekit_lfm.runtime.lines import has_answers
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.store.checkpoint import Checkpoint
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


@dataclass
class Taught:
    """The answers of teachers about the data of a training.

    scores: of the teachers on the development set, by their names, without those that cannot be compared with the
    student; judge: what gives such a score, None without a file.
    """

    planned: PlannedTuning
    course: Course
    teachers: Sequence[Teacher]
    scores: Mapping[str, Any]
    judge: Judge | None = None
    before: Any = None
    documents: Mapping[str, bytes] = field(default_factory=dict)

    def begin(self, loaded: Loaded, examples: Examples) -> tuple[Examples, Loss]:
        """The examples with their numbers, and the loss of the student by its teachers.

        Maps that are trained beside the student become a part of the model.
        """
        recipe, model = self.planned.recipe, loaded.model
        numbered = [{**item, NUMBER: torch.tensor(number)} for number, item in enumerate(examples.items)]
        examples = replace(examples, items=numbered, change=None if examples.change is None else _Keep(examples.change))
        follow, device, options = Follow(self.course, self.teachers), next(model.parameters()).device, recipe.options
        first = examples.step(0, options.batch_size, options.seed)[:2]  # which show the widths
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
        """Remove the answers of this training alone."""
        folder = self.planned.training / ANSWERS
        for place in [*folder.glob("*"), folder]:
            for file in place.glob(PATTERN):
                file.unlink()
            with suppress(OSError):
                place.rmdir()


def recovered(teachers: Sequence[Any], before: Any, after: Any) -> float | None:
    """The share of what a student lacked to the best of its teachers that came back; None if it lacked nothing."""
    if not teachers:
        return None
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


def learn(
    planned: PlannedTuning,
    recipe: DistillRecipe,
    course: Course,
    sources: Sequence[Checkpoint],
    examples: Examples,
    progress: Progress,
) -> Taught:
    """Ask the teachers about the examples that the training will use, and judge them; one is in memory at a time.

    Without a cache they stay in memory, and are asked in each step. Raises PlanError for a teacher that reads the data
    in another way than the student.
    """
    options = recipe.options
    if recipe.is_cached and current_group().count > 1:
        raise PlanError("several processes ask the teachers in each step; set cache to false (--no-cache)")
    numbers = sorted({i for k in range(options.steps) for i in examples.step(k, options.batch_size, options.seed)})
    judge = (
        None
        if recipe.dev_file is None
        else judge_data(planned.path_of(recipe.dev_file), recipe.task, recipe.window, None)
    )
    teachers, scores = list[Teacher](), dict[str, Any]()
    for number, (entry, source) in enumerate(zip(recipe.teachers, sources, strict=True)):
        loaded = load_model(source, recipe.task, device=planned.device)
        other = read_all(loaded, planned, fits=False).examples
        if course.by_tokens:
            _check_reading(entry.model, planned, examples, other)
            other = examples
        else:
            _check_places(entry.model, planned, examples, other)
        if judge is not None and entry.classes is None and _is_comparable(planned, course, source):
            scores[entry.model] = judge(loaded)
        width = None if "uld" in course.weights else course.widths[number]
        temperature = 1.0 if recipe.top_k is None else recipe.temperature
        reading = Reading(recipe.task, course.wanted(number), recipe.top_k, temperature, width)
        if reading.wanted.attentions:
            use_plain_attention(loaded.model)
        if recipe.is_cached:
            facts = [
                source.content,
                other.digest,
                repr(reading),
                planned.device.partition(":")[0],
                versions("torch"),
            ]
            key = xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
            folder = recipe.cache_folder or planned.training / ANSWERS
            kept = Kept(folder / key, key, torch.device(planned.device))
            with progress.by_count(" examples", f"asking {entry.model}") as tell:
                kept.fill(loaded.model, reading, other, numbers, tell)
            teachers.append(kept)
        else:
            teachers.append(Live(loaded.model, reading, None if recipe.task == "masked_lm" else other))
        del loaded
        gc.collect()
    return Taught(planned, course, teachers, scores, judge)


def _is_comparable(planned: PlannedTuning, course: Course, teacher: Checkpoint) -> bool:
    """Whether a teacher's score on the development set compares with the student's.

    It does not for other classes, nor where losses are per token of another tokenizer, as of answers.
    """
    dev = planned.recipe.dev_file
    if planned.recipe.task == "classification":
        return labels_of(planned.source.config) == labels_of(teacher.config)
    return course.by_tokens or dev is None or not has_answers(planned.path_of(dev))


def _check_reading(teacher: str, planned: PlannedTuning, own: Examples, other: Examples) -> None:
    """Raise PlanError if a teacher reads the examples in another way: by another tokenizer, or image processor."""
    student = planned.recipe.model
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
        "family, let the teacher write texts (`mergekit-lfm generate`) and tune on them, or, for a language model, set "
        "the loss uld, alone or with task, which pairs the tokens of two tokenizers by their places in the text"
    )


def _check_places(teacher: str, planned: PlannedTuning, own: Examples, other: Examples) -> None:
    """Raise PlanError if a teacher reads other examples, or shares no place with the student in any of them.

    Both read the same files, and an example is a line of one, so that as many are the same.
    """
    student = planned.recipe.model
    if len(own) != len(other):
        found = f"{teacher} reads {len(other)} examples, and {student} {len(own)}"
        raise PlanError(f"{found}; expected as many. Give data that stay as they are")
    if not any(pair_places(target_places(a), target_places(b)) for a, b in zip(own.items, other.items, strict=True)):
        raise PlanError(
            f"{teacher} and {student} share no place in the texts where both begin a token; expected some, which uld "
            "compares. Choose a teacher whose tokens are words or parts of words, as the student's"
        )


def _is_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two examples have the same inputs; labels and positives may be one's own."""
    return all(name in mine and torch.equal(mine[name], x) for name, x in theirs.items() if name != "labels")
