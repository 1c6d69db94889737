"""Judgements as a stage of a recipe: models scored on data, and the scores kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mergekit_lfm.api.attachments import ReadModel, open_named
from mergekit_lfm.api.judge import judge_data
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.route import Expert, judge_routed
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.errors import FormatError
from mergekit_lfm.judge.evaluate import Accuracy, Perplexity, Retrieval
from mergekit_lfm.judge.held_out import Fit, TokenLoss
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.eval_recipe import JOB, ROUTED, EvalRecipe
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import digest_file, read_json

Score = Perplexity | Accuracy | Retrieval | TokenLoss | Fit
KINDS: Mapping[str, type[Score]] = {each.__name__: each for each in (Perplexity, Accuracy, Retrieval, TokenLoss, Fit)}
Scores = Mapping[str, Mapping[str, Score]]  # by model, then by file, as the recipe names them


@dataclass(frozen=True)
class PlannedEval:
    """A judgement that is checked, and not made yet. device: where models run.

    experts: models that are judged together, each with the file of its texts.
    """

    recipe: EvalRecipe
    out: Path
    models: tuple[ReadModel, ...]
    experts: tuple[tuple[ReadModel, Path], ...]
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def request(self) -> FileRequest:
        """The request that the file answers: the recipe, and the content of models and data."""
        recipe, every = self.recipe, [*self.models, *(model for model, _ in self.experts)]
        files = (*recipe.files, *(file for _, file in self.experts), *(file for model in every for file in model.files))
        whole = {**recipe.normalised(), "device": self.device.partition(":")[0]}
        whole["content"] = [digest_file(path) for path in files]
        names = public_names([*recipe.models, *recipe.data, *recipe.experts, *recipe.experts.values()])
        public = {**whole, **{key: [names[ref] for ref in whole[key]] for key in ("models", "data")}}
        public |= {"experts": {names[ref]: names[file] for ref, file in recipe.experts.items()}} if self.experts else {}
        inputs = tuple(RequestInput(model.ref, model.source, model.source.config) for model in every)
        request = Request(whole, public, inputs)
        return FileRequest(request, files, "a file of scores", lambda out: _digest_in(out) == request.digest)

    def stand_in(self, file: Path) -> None:
        """Write an empty file, since no stage reads scores."""
        file.touch()


def plan_eval(recipe: EvalRecipe, out: Path, *, device: str | None = None) -> PlannedEval:
    """Check a recipe that judges models. Reads headers only. Raises PlanError without the device."""
    models = tuple(map(open_named, recipe.found))
    experts = tuple((open_named(found), file) for found, file in recipe.expert_models)
    return PlannedEval(recipe, out, models, experts, str(find_device(device or "cpu")))


def evaluate_planned(
    planned: PlannedEval, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Scores]:
    """Judge the models, one in memory at a time, and write the scores: a JSON file with the recipe."""
    started, request = time.monotonic(), planned.request
    digest = request.request.digest
    there = request.is_answered(planned.out, overwrite=overwrite)
    if there:
        scores: Scores = _read_scores(planned.out)
    else:
        with set_threads(threads):
            scores = _judge(planned, progress)
        request.request.check_unchanged()
        facts = {"job": JOB, "request": digest, "recipe": request.request.public}
        facts["kind"] = next(type(score).__name__ for own in scores.values() for score in own.values())
        facts["scores"] = {ref: {name: asdict(score) for name, score in own.items()} for ref, own in scores.items()}
        planned.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(planned.out, (json.dumps(facts, indent=2) + "\n").encode())
    return Outcome(planned.out, scores, digest, there, warn_of(planned.notices), time.monotonic() - started)


def _judge(planned: PlannedEval, progress: Progress) -> Scores:
    """The scores of all models, and those of the experts together."""
    recipe, device = planned.recipe, planned.device
    paths = dict(zip(recipe.data, recipe.files, strict=True))
    how: dict[str, Any] = {"window": recipe.window, "stride": recipe.stride}
    judges = {name: judge_data(path, recipe.task, **how) for name, path in paths.items()}
    scores, count = dict[str, Mapping[str, Score]](), len(planned.models) * len(judges)
    with progress.by_count("scores", "judging") as report:
        for model in planned.models:
            loaded, own = model.load(recipe.task, device), dict[str, Score]()
            for name, judge in judges.items():
                own[name] = judge(loaded)
                report(len(scores) * len(judges) + len(own), count)
            scores[model.ref] = own
    if planned.experts:
        experts = [Expert(m.ref, (file,), partial(m.load, recipe.task, device)) for m, file in planned.experts]
        scores[ROUTED] = judge_routed(experts, paths, recipe.task, device=device, **how).scores
    return scores


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
