"""`distill_model`: train a saved model, the student, to follow others, its teachers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.distill_plans import plan_distillation
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.tune import as_settings, tune_planned
from mergekit_lfm.api.tune_results import Tuned
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.distill_recipe import DistillRecipe


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
    encoders {"embed": 1}. temperature: of kd, uld and local, by default 2. divergence: "forward" (by default),
    "reverse" or "js". top_k: read so many of the largest scores, and the share of the rest. layers: the number of a
    hidden state of the student, and of the teacher's that it follows; by default evenly. cache: a folder to keep what
    the teachers say for other runs; False holds the teachers in memory, and asks them in each step, to the same bytes.
    training: the method, its parameters and all else that `tune_model` takes.

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
