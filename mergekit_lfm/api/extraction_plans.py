"""Extractions of adapters that are planned: which tensors become products, are saved whole, or have no place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.output.adapter import AdapterOutput, NewAdapter
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.plan.extraction import Extraction, plan_extraction
from mergekit_lfm.plan.groups import Group, Selection
from mergekit_lfm.recipe.extract_recipe import ExtractRecipe
from mergekit_lfm.store.hub import HubName
from mergekit_lfm.views.adapted import open_found

LABELS = re.compile(r"^(classifier(\.out_proj)?|score)\.weight$")  # has a row for each


@dataclass(frozen=True)
class PlannedExtraction:
    """An extraction that is checked, and not made yet. device: where matrices are decomposed."""

    recipe: ExtractRecipe
    out: Path
    plan: Extraction
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @cached_property
    def request(self) -> Request:
        """The request that the adapter answers. The kind of device counts, since sums differ there."""
        recipe = {**self.recipe.normalised(), **({} if self.device == "cpu" else {"device": "cuda"})}
        model, base = self.recipe.model, self.recipe.base_model
        names = public_names([model, base])
        public = {**recipe, "model": names[model], "base_model": names[base]}
        sides = ((model, self.plan.model), (base, self.plan.base))
        return Request(recipe, public, tuple(RequestInput(ref, side, side.config) for ref, side in sides))

    @cached_property
    def output(self) -> AdapterOutput:
        """The facts in the adapter's files besides its tensors."""
        _, base = self.recipe.models
        repo = base.source.repo if isinstance(base.source, HubName) and not base.adapters else None
        return output_of(self.plan, self.recipe.base_model, repo)

    def rank(self, group: Group) -> int:
        """The rank of a group, or the most that it can have."""
        rank: int = self.recipe.normalised().get("rank", group.most)
        return min(rank, group.most)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result, without data: all products, and what the model alone has.

        Whether other tensors are saved depends on data: they are there only if nothing else is.
        """
        import torch

        from mergekit_lfm.engine.extraction import add_group

        plan, dtype = self.plan, getattr(torch, self.recipe.dtype or "float32")
        adapter = NewAdapter(self.output, None)
        for group in plan.groups:
            rank, count = self.rank(group), len(group.members)
            a = torch.empty(rank, group.columns, dtype=dtype, device="meta")
            b = torch.empty(group.out, rank, dtype=dtype, device="meta")
            add_group(adapter, group, [(a, b)] * count)
        for name in self._saved_for_sure():
            spec = plan.model[name]
            adapter.save(plan.names[name], torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta"))
        adapter.stand_in(folder)

    def _saved_for_sure(self) -> Iterator[str]:
        """The tensors that are saved whatever the data are; all that can be where nothing is sure."""
        plan = self.plan
        sure = [module for module, own in plan.modules.items() if not plan.added.isdisjoint(own)]
        modules = plan.save_with(sure if sure or plan.groups else [*plan.modules])
        yield from (name for module, own in plan.modules.items() if module in modules for name in own)


def plan_extract(recipe: ExtractRecipe, out: Path, *, device: str | None = None) -> PlannedExtraction:
    """Check an extraction, and say what it would make. It reads headers only.

    Raises PlanError if the models differ in more than values, or without the device, FormatError for a damaged model.
    """
    model, base = map(open_found, recipe.models)
    selection = Selection(recipe.include, recipe.exclude, recipe.save, recipe.embed_lora)
    plan = plan_extraction(model, base, (recipe.model, recipe.base_model), selection)
    name = device or "cpu"
    return PlannedExtraction(recipe, out, plan, "cpu" if name == "cpu" or find_gpu(name) is None else name)


def output_of(plan: Extraction, base: str, repo: str | None) -> AdapterOutput:
    """The facts in the files of an adapter for the planned model. base: as its user names it; repo: on the Hub."""
    architecture = next(iter(plan.model.config.get("architectures") or []), None)
    return AdapterOutput(
        names=plan.running,
        base=base,
        architecture=architecture if isinstance(architecture, str) else None,
        labels=_labels(plan),
        fan_in_fan_out=plan.turned,
        tied=plan.tied,
        repo=repo,
        license=read_license(plan.base.path),
    )


def _labels(plan: Extraction) -> int | None:
    """The number of a classifier's labels, if it has a head of its own."""
    heads = (name for name, running in plan.names.items() if LABELS.search(running))
    return next((plan.model[name].shape[0] for name in heads), None)
