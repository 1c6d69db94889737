"""`make_student`: a smaller model from a saved one: some of its layers, narrower MLPs, or the same with new weights.

Layers are a `passthrough` stack, planned as the engine's; units are chosen in a view of the model. Nothing is trained.
Source: layers after DistilBERT (Sanh et al. 2019, arXiv 1910.01108, section 3) and TinyBERT (Jiao et al. 2020, arXiv
1909.10351, section 3); units as `engine/units.py` says.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.engine.documents import Documents
from mergekit_lfm.errors import FormatError
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput, result_of
from mergekit_lfm.output.save import save_checkpoint, stand_in
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.student import Mlps, check_statistics, choose_layers, find_mlps, narrowed, ranges_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.student_recipe import StudentRecipe
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.sidecars import OTHER_WEIGHTS, sidecars_of
from mergekit_lfm.views.adapted import open_found
from mergekit_lfm.views.blank import Blank
from mergekit_lfm.views.selected import Selected

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Student:
    """A smaller model. layers: those of the model that it has, () for all; of: how many the model has.

    units, of_units: of each MLP, 0 where they stay as they are. parameters: its numbers; of_parameters: the model's.
    seed: of its random weights, None for the model's own.
    """

    layers: tuple[int, ...]
    of: int
    units: int
    of_units: int
    parameters: int
    of_parameters: int
    seed: int | None


@dataclass(frozen=True)
class PlannedStudent:
    """A student that is checked, and not made yet.

    source: the model; without its weights if new ones take their place. layers, of: as of `Student`. names: by tensor
    of the student, that of the model. config: the bytes of config.json, None without one. mlps: those made narrower.
    """

    recipe: StudentRecipe
    out: Path
    source: Checkpoint
    layers: tuple[int, ...]
    of: int
    names: Mapping[str, str]
    config: bytes | None
    mlps: Mlps | None
    statistics: Statistics | None

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def request(self) -> Request:
        """The request that the folder answers."""
        whole, model, stats = self.recipe.normalised(), self.recipe.model, self.recipe.stats
        inputs = [RequestInput(model, self.source, self.source.config)]
        if stats is not None and self.statistics is not None:
            inputs.append(RequestInput(stats, self.statistics.tensors, self.statistics.info.metadata()))
        names = public_names([source.label for source in inputs])
        named = {"model": names[model], **({} if stats is None else {"stats": names[stats]})}
        return Request(whole, {**whole, **named}, tuple(inputs), LOCK)

    @property
    def documents(self) -> dict[str, bytes]:
        """The files that are not the model's."""
        return {} if self.config is None else {CONFIG: self.config}

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data."""
        if self.recipe.random:
            stand_in(Blank(self.source.path, self._specs(self._fresh(empty=True))), folder, self.documents)
        else:
            mlps = self.mlps
            first = {} if mlps is None else {group: [*range(mlps.kept)] for group in mlps.groups}
            stand_in(self._cut(first), folder, self.documents)

    def make(self) -> tuple[Student, list[str]]:
        """Write the folder of the result. Also a line for each file that is left behind."""
        request, tensors = self.request, dict[str, Any]()
        _ = request.digest
        if self.recipe.random:
            tensors = self._fresh()
            made: Checkpoint = Blank(self.source.path, self._specs(tensors))
        else:
            self.source.fetch()
            made = self._cut(self._choose())
        student = Student(
            self.layers,
            self.of,
            units=0 if self.mlps is None else self.mlps.kept,
            of_units=0 if self.mlps is None else self.mlps.of,
            parameters=sum(spec.numel for spec in made.values()),
            of_parameters=sum(spec.numel for spec in self.source.values()),
            seed=self.recipe.normalised().get("seed"),
        )
        left = save_checkpoint(
            made,
            self.out,
            tensors,
            self.documents,
            lock=lambda files, headers, written: {LOCK: request.lock(files, headers, written, asdict(student))},
        )
        if self.recipe.random:
            left = {name: why for name, why in left.items() if why != OTHER_WEIGHTS or "/" in name}
        return student, [f"{name} is left behind: {why}" for name, why in left.items()]

    def _fresh(self, *, empty: bool = False) -> dict[str, Any]:
        """The tensors of a new model of the student's config."""
        from mergekit_lfm.runtime.fresh import fresh_tensors

        assert self.config is not None
        seed = self.recipe.seed or 0
        return fresh_tensors(json.loads(self.config), self.source.path, seed, empty=empty)

    @staticmethod
    def _specs(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: spec_of(name, x) for name, x in tensors.items()}

    def _choose(self) -> dict[str, list[int]]:
        """The units of each MLP that stay."""
        from mergekit_lfm.engine.units import choose_units

        used = {*self.names.values()}
        return {} if self.mlps is None else choose_units(self.source, self.mlps, self.statistics, used)

    def _cut(self, units: Mapping[str, Sequence[int]]) -> Checkpoint:
        """The model with these units of each MLP, and of that the layers that stay."""
        source = self.source
        if self.mlps is not None:
            import torch

            from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
            from mergekit_lfm.views.rewritten import Rewritten

            elements = {group: UnitsElement(torch.tensor(own)) for group, own in units.items()}
            transform = Transform(self.mlps.symmetries, elements, TransformInfo("student", exact=False))
            source = Rewritten(source, transform, {"units": dict(units)})
        return Selected(source, self.names)


def plan_student(recipe: StudentRecipe, out: Path) -> PlannedStudent:
    """Check a student, from headers alone; with statistics the model is read once, to know it by its content.

    Raises PlanError for layers that the model lacks, for MLPs that are not known and for statistics that do not fit,
    FormatError for a damaged model.
    """
    label, source = recipe.model, _open_source(recipe)
    layers, of = tuple[int, ...](), 0
    if recipe.layers is not None or recipe.keep is not None:
        layers, of = choose_layers(source, label, recipe.layers, recipe.keep)
    mlps = None if recipe.mlp is None else find_mlps(source, label, recipe.mlp)
    statistics = None if recipe.statistics is None else open_statistics(recipe.statistics.path)
    if mlps is not None and statistics is not None:
        check_statistics(statistics, str(recipe.stats), source, label, mlps)
    names, config = _stack(source, layers)
    if mlps is not None and config is not None:
        config = (json.dumps(narrowed(json.loads(config), mlps), indent=2, ensure_ascii=False) + "\n").encode()
    return PlannedStudent(recipe, out, source, layers, of, names, config, mlps, statistics)


def _open_source(recipe: StudentRecipe) -> Checkpoint:
    """The model; if its weights do not count, the names and shapes that its config means."""
    if not recipe.random:
        return open_found(recipe.found)
    from mergekit_lfm.runtime.fresh import fresh_tensors

    folder = recipe.found.source
    if not isinstance(folder, Path):
        model = open_checkpoint(folder)
        sidecars_of(model)  # fetches the files beside the weights
        folder = model.path
    config = Blank(folder, {}).config
    if "model_type" not in config:
        raise FormatError(
            f"{folder}: found no config.json with a model_type; expected one, from which a new model is made"
        )
    specs = {name: spec_of(name, x) for name, x in fresh_tensors(config, folder, 0, empty=True).items()}
    return Blank(folder, specs)


def _stack(source: Checkpoint, layers: Sequence[int]) -> tuple[dict[str, str], bytes | None]:
    """Of each tensor of a stack of layers its name in the model; and the bytes of its config. Without layers: all."""
    model = {"model": os.fspath(source.path)}
    slices = [{"sources": [{**model, "layer_range": [*span]}]} for span in ranges_of(layers)]
    parts = {"slices": slices} if slices else {"models": [model]}
    recipe = Recipe.parse({"merge_method": "passthrough", "card": False, **parts}, label="student")
    plan = make_plan(recipe, views=tuple(source for _ in recipe.all_models))
    sources = {name: next(iter(job.match.sources.values()))[1] for job in plan.tensors for name in job.names}
    names = {spec.name: sources[spec.name] for shard in plan.shards for spec in shard.tensors}
    return names, Documents(plan, "student").files.get(CONFIG)


def make_student(
    model: StrPath,
    out: StrPath,
    *,
    layers: Sequence[int] | None = None,
    keep: float | None = None,
    mlp: float | None = None,
    stats: StrPath | None = None,
    random: bool = False,
    seed: int | None = None,
    overwrite: bool = False,
) -> Outcome[Student]:
    """Write a smaller model: the one to distil into, or a pruned one.

    layers: those of the model, in this order, one or more times each; or keep: a share of them, evenly spaced. mlp: the
    share of the hidden units of each MLP that stays: those of the largest importance, by the weights, or with `stats`,
    Gram matrices of the model, by what they add to the MLP's output. random: new weights, as transformers draws them,
    from `seed` (0); then a folder with a config.json suffices. The outcome's digest is that of the request.

    Raises PlanError for layers that the model lacks, an architecture whose MLPs are not known, and statistics of
    another model; FormatError for a damaged model; with `random` ImportError without transformers.
    """
    data: dict[str, Any] = {"job": "student", "model": os.fspath(model), "random": random, "seed": seed}
    data |= {"layers": None if layers is None else [*layers], "keep": keep, "mlp": mlp}
    data |= {"stats": None if stats is None else os.fspath(stats)}
    recipe = StudentRecipe.parse(data, label="student")
    return make_planned_student(plan_student(recipe, expand(out)), overwrite=overwrite)


def make_planned_student(
    planned: PlannedStudent,
    *,
    overwrite: bool = False,
    progress: object = None,  # noqa: ARG001
) -> Outcome[Student]:
    """Carry a planned student out; as `make_student` does."""
    started, request, left = time.monotonic(), planned.request, list[str]()
    there = request.is_answered(planned.out, overwrite=overwrite)
    if there:
        facts = dict(result_of(planned.out, LOCK))
        student = Student(**{**facts, "layers": tuple(facts["layers"])})
    else:
        student, left = planned.make()
    warnings = warn_of([*planned.notices, *left])
    return Outcome(planned.out, student, request.digest, there, warnings, time.monotonic() - started)
