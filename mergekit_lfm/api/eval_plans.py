"""Judgements as a stage of a recipe: models scored on data, and the scores kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lfm.api.attachments import load_with, split_attached
from mergekit_lfm.api.judge import judge_data
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.errors import FormatError
from mergekit_lfm.judge.evaluate import Accuracy, Perplexity, Retrieval
from mergekit_lfm.judge.held_out import Fit, TokenLoss
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.recipe.eval_recipe import JOB, EvalRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import digest_file, read_json
from mergekit_lfm.views.adapted import open_found

Score = Perplexity | Accuracy | Retrieval | TokenLoss | Fit
KINDS: Mapping[str, type[Score]] = {each.__name__: each for each in (Perplexity, Accuracy, Retrieval, TokenLoss, Fit)}
Scores = Mapping[str, Mapping[str, Score]]  # by model, then by file, as the recipe names them


@dataclass(frozen=True)
class PlannedEval:
    """A judgement that is checked, and not made yet. device: where models run.

    sources: the models; attached: what runs with each and changes no weight, such as a bottleneck adapter.
    """

    recipe: EvalRecipe
    out: Path
    sources: tuple[Checkpoint, ...]
    attached: tuple[AdapterRef | None, ...]
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def request(self) -> FileRequest:
        """The request that the file answers: the recipe, and the content of models and data."""
        recipe = self.recipe
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0]}
        modules = [Path(ref.source) for ref in self.attached if ref is not None and isinstance(ref.source, Path)]
        whole["content"] = [digest_file(path) for path in (*recipe.files, *modules)]
        names = public_names([*recipe.models, *recipe.data])
        public = {**whole, **{key: [names[ref] for ref in whole[key]] for key in ("models", "data")}}
        pairs = zip(recipe.models, self.sources, strict=True)
        inputs = tuple(RequestInput(ref, source, source.config) for ref, source in pairs)
        request = Request(whole, public, inputs)
        files = (*recipe.files, *modules)
        return FileRequest(request, files, "a file of scores", lambda out: _digest_in(out) == request.digest)

    def stand_in(self, file: Path) -> None:
        """Write an empty file, since no stage reads scores."""
        file.touch()


def plan_eval(recipe: EvalRecipe, out: Path, *, device: str | None = None) -> PlannedEval:
    """Check a recipe that judges models. Reads headers only. Raises PlanError without the device."""
    found, attached = zip(*map(split_attached, recipe.found), strict=True)
    return PlannedEval(recipe, out, tuple(map(open_found, found)), attached, str(find_device(device or "cpu")))


def evaluate_planned(
    planned: PlannedEval, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Scores]:
    """Judge the models, one in memory at a time, and write the scores: a JSON file with the recipe."""
    started, recipe, request = time.monotonic(), planned.recipe, planned.request
    digest = request.request.digest
    there = request.is_answered(planned.out, overwrite=overwrite)
    if there:
        scores = _read_scores(planned.out)
    else:
        how = (recipe.task, recipe.window, recipe.stride)
        judges = {ref: judge_data(path, *how) for ref, path in zip(recipe.data, recipe.files, strict=True)}
        scores, count = dict[str, dict[str, Score]](), len(planned.sources) * len(judges)
        with set_threads(threads), progress.by_count("scores", "judging") as report:
            for ref, source, attached in zip(recipe.models, planned.sources, planned.attached, strict=True):
                loaded = load_with(source, attached, recipe.task, device=planned.device)
                scores[ref] = {}
                for name, judge in judges.items():
                    scores[ref][name] = judge(loaded)
                    report(sum(map(len, scores.values())), count)
        request.request.check_unchanged()
        facts = {"job": JOB, "request": digest, "recipe": request.request.public}
        facts["kind"] = next(type(score).__name__ for own in scores.values() for score in own.values())
        facts["scores"] = {ref: {name: asdict(score) for name, score in own.items()} for ref, own in scores.items()}
        planned.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(planned.out, (json.dumps(facts, indent=2) + "\n").encode())
    return Outcome(planned.out, scores, digest, there, warn_of(planned.notices), time.monotonic() - started)


def _read(file: Path) -> dict[str, Any]:
    """The content of a file of scores. Raises FormatError for another file."""
    facts = read_json(file)
    if not (isinstance(facts, dict) and facts.get("job") == JOB and "request" in facts):
        raise FormatError(f"{file} is not a file of scores; expected one of a recipe with `job: eval`")
    return facts


def _digest_in(file: Path) -> str:
    return str(_read(file)["request"])


def _read_scores(file: Path) -> dict[str, dict[str, Score]]:
    facts = _read(file)
    kind = KINDS[facts["kind"]]
    return {ref: {name: kind(**score) for name, score in own.items()} for ref, own in facts["scores"].items()}
