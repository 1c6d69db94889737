"""`meta_train`: from a saved model and many tasks to an initialisation, from which few steps learn a new task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.meta_plans import PlannedMeta, plan_meta
from mergekit_lfm.api.meta_rounds import learn_on_disk
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.tune import as_settings, tune_planned
from mergekit_lfm.api.tune_results import Tuned
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.meta_recipe import MetaRecipe


def meta_train(
    model: StrPath,
    data: StrPath | Sequence[StrPath | Mapping[str, Any]],
    out: StrPath,
    *,
    task: str,
    algorithm: str = "maml",
    ways: int | None = None,
    shots: int = 5,
    queries: int = 15,
    inner_steps: int | None = None,
    inner_rate: float | None = None,
    test: StrPath | Sequence[StrPath] | Mapping[str, Any] | None = None,
    on_disk: bool = False,
    texts: Mapping[str, Any] | None = None,
    memory: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **training: Any,
) -> Outcome[Tuned]:
    """Learn an initialisation from many tasks, and write it as `tune_model` does: a base to tune and to merge on.

    data: as of `tune_model`. ways: classes of an episode, drawn anew for each; without it every data file is a task.
    shots, queries: examples of an episode to adapt on, and to judge by, for each class or file. inner_steps,
    inner_rate: of adapting, by default the algorithm's. test: files of tasks that are not trained on, or a mapping with
    `data` and the other fields of `TestEntry`; the result's facts then say how a random start, the model, joint
    training and the result do on them, each in the cell of one grid of rates and steps that is best for it. on_disk: of
    reptile, whose tasks are files: the models of a step's tasks are checkpoints in OUT.rounds, which the engine merges;
    several processes with the same call share them, to the same bytes. texts: of film, {model, names}: the names of
    classes by their labels, and the model of embeddings that makes vectors of them. memory: a budget in bytes, which
    the estimate of a step has to fit. training: `method`, what is learned, and all else that `tune_model` takes;
    `batch_size` is tasks of a step, 4 by default. Raises PlanError and the other errors of `tune_model`.
    """
    settings = {"model": model, "data": data, "task": task, **training}
    own: dict[str, Any] = {"algorithm": algorithm, "ways": ways, "shots": shots, "queries": queries}
    own |= {"on_disk": True} if on_disk else {}
    own |= (
        {} if texts is None else {"texts": {name: os.fspath(x) if name == "model" else x for name, x in texts.items()}}
    )
    own |= {"inner_steps": inner_steps, "inner_rate": inner_rate, "test": None if test is None else _as_test(test)}
    recipe = {**as_settings(settings), "job": "meta", **{name: x for name, x in own.items() if x is not None}}
    planned = plan_meta(MetaRecipe.parse(recipe, label="meta"), expand(out), device=device, memory=memory)
    return meta_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


def meta_planned(
    planned: PlannedMeta, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Tuned]:
    """Carry a planned meta-learning out; as `meta_train` does."""
    carry_out = learn_on_disk if planned.meta.on_disk else tune_planned
    return carry_out(planned, threads=threads, overwrite=overwrite, progress=progress)


def _as_test(test: StrPath | Sequence[StrPath] | Mapping[str, Any]) -> dict[str, Any]:
    """The test as a recipe has it."""
    whole = dict(test) if isinstance(test, Mapping) else {"data": test}
    data = whole["data"]
    entries = [data] if isinstance(data, str | os.PathLike) else [*data]
    return {**whole, "data": [dict(each) if isinstance(each, Mapping) else os.fspath(each) for each in entries]}
