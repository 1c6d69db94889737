"""Every input tensor is in exactly one place: merged, copied, or dropped with a reason. Over random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_merges import Tensors
from models import save_checkpoint

from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

TRUNK = ("embed_tokens.weight", "layers.0.q.weight", "layers.1.q.weight", "norm.weight")
OTHERS = {
    "lm_head.weight": (12, 4),
    "classifier.weight": (3, 4),
    "score.bias": (2,),
    "layers.0.rotary_emb.inv_freq": (2,),
    "bn.running_var": (4,),
    "bn.num_batches_tracked": (),
    "attn_mask": (4, 4),
    "position_ids": (1, 4),
}


def random_model(random: np.random.Generator, prefix: str) -> Tensors:
    """A trunk, some of the other tensors, now and then in another shape, and a vocabulary of 10 to 12 rows."""
    rows = int(random.integers(10, 13))
    tensors = {f"{prefix}{name}": torch.rand(rows if "embed" in name else 4, 4) for name in TRUNK}
    tensors[f"{prefix}norm.weight"] = torch.rand(4)
    for name, shape in OTHERS.items():
        if random.random() < 0.6:
            shape = (rows, 4) if name == "lm_head.weight" else shape
            shape = (*shape[:-1], shape[-1] + 1) if shape and random.random() < 0.15 else shape
            whole = name.endswith(("tracked", "ids"))
            tensors[name] = torch.randint(0, 9, shape) if whole else torch.rand(shape)
    if random.random() < 0.3 and f"{prefix}embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
    return tensors


def places(plan: Plan) -> dict[tuple[str, str], list[str]]:
    """For each tensor of each model, under its name in the files, the places in the plan that have it."""
    found: dict[tuple[str, str], list[str]] = {
        (label, model.name_in_files(name)): []
        for label, model in zip(plan.labels, plan.models, strict=True)
        for name in model
    }
    for label, name, why in plan.dropped:
        if (label, name) in found:  # else it is about rows
            found[label, name].append(f"dropped: {why}")
    for job in plan.tensors:
        for i, name in job.match.sources.values():
            found[plan.labels[i], plan.models[i].name_in_files(name)].append(job.name)
        for i, name in (twin for _, twin in job.match.twins if twin[1] in job.names):
            found[plan.labels[i], plan.models[i].name_in_files(name)].append(job.name)
    return found


CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"tensors": "common"},
    {"tensors": "common", "rows": "crop"},
    {"rows": "keep", "keep": {"classifier": "base", "score": "drop", "lm_head": "base"}},
    {"tensors": "common", "rows": "keep", "keep": {"norm": "drop"}},
)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 9)) for seed in range(60)])
def test_every_tensor_is_in_one_place(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    configs: list[dict[str, Any]] = [{}, {"model_type": "llama"}, {"model_type": "llama", "tie_word_embeddings": True}]
    models = [random_model(random, prefix) for prefix in random.choice(["", "model."], 3)]
    for i, tensors in enumerate(models):
        save_checkpoint(tmp_path / f"m{i}", tensors, configs[seed % 3])
    accepted = 0
    for choice in CHOICES:
        lines = [{"model": str(tmp_path / f"m{i}")} for i in range(3)]
        recipe = {"merge_method": "linear", "models": lines, "parameters": {"weight": 1.0}, **choice}
        try:
            plan = make_plan(Recipe.parse(recipe))
        except PlanError as error:
            assert "add " in str(error) or "`keep`" in str(error) or "base" in str(error), error
            continue
        accepted += 1
        found = places(plan)
        assert {label for label, _ in found} == {str(tmp_path / f"m{i}") for i in range(3)}
        for where, here in found.items():
            dropped = [place for place in here if place.startswith("dropped")]
            # a tied model's embedding may be an untied one's head as well
            assert here and (len(dropped) in (0, len(here))) and len(dropped) <= 1, (where, here)
        written = [spec.name for shard in plan.shards for spec in shard.tensors]
        assert sorted(written) == sorted(name for job in plan.tensors for name in job.names)
    assert accepted
