"""Statistics as a stage of a recipe: planned from headers and data, and collected by `collect`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.artifacts.statistics import Statistics, StatisticsInfo, open_statistics
from mergekit_lfm.collect.request import Outline
from mergekit_lfm.collect.run import collect, differences, known_facts
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.adapter import write_empty
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.output.written import stored_name
from mergekit_lfm.recipe.stats_recipe import StatsRecipe
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import empty_model, load_reader
from mergekit_lfm.runtime.subject import Subject
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec, encode_header
from mergekit_lfm.views.adapted import open_found


@dataclass(frozen=True)
class PlannedStats:
    """Statistics that are checked, and not collected yet. device: where the model runs."""

    recipe: StatsRecipe
    out: Path
    source: Checkpoint
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @property
    def options(self) -> dict[str, Any]:
        """The options of `collect`."""
        recipe = self.recipe
        own = ("task", "layers", "batch_size", "window", "max_examples", "dtype")
        return {**{name: getattr(recipe, name) for name in own}, "device": self.device, **recipe.settings}

    @cached_property
    def facts(self) -> StatisticsInfo:
        """The facts of the file that are known before the model runs."""
        recipe = self.recipe
        tokenizer, positions = load_reader(self.source, recipe.task)
        how: dict[str, Any] = {key: getattr(recipe, key) for key in ("batch_size", "max_examples", "window")}
        batches = read_data(recipe.data_file, recipe.task, tokenizer, positions=positions, **how)
        models = [(self.source.content, recipe.dtype)]
        return known_facts(recipe.kind, models, batches, recipe.task, recipe.layers, recipe.settings)

    @cached_property
    def request(self) -> FileRequest:
        """The request that the file answers."""
        whole = self.recipe.normalised()
        names = public_names([self.recipe.model, self.recipe.data])
        public = {**whole, "model": names[self.recipe.model], "data": names[self.recipe.data]}
        request = Request(whole, public, (RequestInput(self.recipe.model, self.source, self.source.config),))

        def answers(out: Path) -> bool:
            return open_statistics(out).info.kind == self.recipe.kind and not differences(out, self.facts)

        return FileRequest(request, (self.recipe.data_file,), "a statistics file", answers)

    def stand_in(self, file: Path) -> None:
        """Write a file like the result, without data."""
        module = empty_model(self.source, self.recipe.task)
        named = dict(module.named_parameters(remove_duplicate=False))
        tensors = {name: tensor for name, x in named.items() if (tensor := stored_name(module, name, x, self.source))}
        subject = Subject(module, self.source.content, tensors)
        assert self.recipe.method.outline is not None
        outline: Outline = self.recipe.method.outline(subject, self.recipe.layers)
        models = (self.source.content,)
        info = StatisticsInfo(self.recipe.kind, models, "", {}, 0, dict(outline.layers), outline.norm)
        info = replace(info, skipped=dict(outline.skipped))
        specs = [TensorSpec(name, shape, "float32") for name, shape in outline.entries.items()]
        write_empty(file, encode_header(specs, info.metadata())[0], specs)


def plan_stats(recipe: StatsRecipe, out: Path, *, device: str | None = None) -> PlannedStats:
    """Check a recipe of statistics. Reads headers only. Raises PlanError without the device."""
    return PlannedStats(recipe, out, open_found(recipe.found), str(find_device(device or "cpu")))


def collect_planned(
    planned: PlannedStats,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Statistics]:
    """Collect planned statistics; as `collect_stats` does."""
    started, recipe = time.monotonic(), planned.recipe
    there = planned.request.is_answered(planned.out, overwrite=overwrite)
    if there:
        statistics = open_statistics(planned.out)
    else:
        with set_threads(threads), progress.by_count("examples", "collecting") as count:
            statistics = collect(
                recipe.kind,
                planned.source,
                recipe.data_file,
                planned.out,
                memory=memory,
                overwrite=overwrite,
                progress=count,
                **planned.options,
            )
    content, warnings = statistics.tensors.content, warn_of(planned.notices)
    return Outcome(planned.out, statistics, content, there, warnings, time.monotonic() - started)
