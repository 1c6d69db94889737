"""Names that differ by a rule are read as the template's; otherwise the message says how they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import Tensors, load_all
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

NAMES = (
    "transformer.wte.weight",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.1.ln_1.weight",
    "transformer.h.1.attn.c_attn.weight",
    "transformer.ln_f.weight",
    "lm_head.weight",
)
SHAPES = ((12, 4), (4,), (4, 12), (4,), (4, 12), (4,), (12, 4))


def tensors_of(seed: int, names: tuple[str, ...] = NAMES) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in zip(names, SHAPES, strict=False)}


def renamed(old: str, new: str, names: tuple[str, ...] = NAMES) -> tuple[str, ...]:
    return tuple(name.replace(old, new, 1) if name.startswith(old) else name for name in names)


def recipe_of(tmp_path: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}, **more}


VISION = (
    "visual.patch_embed.proj.weight", "visual.blocks.0.norm.weight", "model.layers.0.q.weight",
    "model.norm.weight", "model.embed_tokens.weight", "visual.merger.ln_q.weight", "lm_head.weight",
)  # fmt: skip
CASES = {
    "a prefix more": (NAMES, tuple("model." + name for name in NAMES)),
    "a prefix less, with a head": (NAMES, renamed("transformer.", "")),
    "another prefix": (tuple("0.auto." + n for n in NAMES), tuple("bert." + n for n in NAMES)),
    "compiled": (NAMES, tuple("_orig_mod." + name for name in NAMES)),
    "in parallel and compiled": (NAMES, tuple("module._orig_mod." + name for name in NAMES)),
    "checkpointed layers": (NAMES, tuple(n.replace("h.0.", "h.0._checkpoint_wrapped_module.") for n in NAMES)),
    "peft's wrapper": (NAMES, tuple("base_model.model." + name for name in NAMES)),
    "gamma": (
        ("e.LayerNorm.weight", "e.LayerNorm.weights", "w", "f.LayerNorm.bias", "x", "g.LayerNorm.weight", "y"),
        ("e.LayerNorm.gamma", "e.LayerNorm.weights", "w", "f.LayerNorm.beta", "x", "g.LayerNorm.gamma", "y"),
    ),
    "weight norm": (
        ("c.weight_g", "c.weight_v", "w", "d.weight_g", "x", "d.weight_v", "y"),
        tuple(
            name.replace("weight_g", "parametrizations.weight.original0").replace(
                "weight_v", "parametrizations.weight.original1"
            )
            for name in ("c.weight_g", "c.weight_v", "w", "d.weight_g", "x", "d.weight_v", "y")
        ),
    ),
    "vision and language": (
        VISION,
        tuple(
            f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model.", 1) for n in VISION
        ),
    ),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_names_that_differ_by_a_rule(tmp_path: Path, case: str, swapped: bool) -> None:
    one, two = CASES[case][::-1] if swapped else CASES[case]
    a, b = tensors_of(1, one), tensors_of(2, two)
    save_checkpoint(tmp_path / "a", a, {})
    save_checkpoint(tmp_path / "b", b, {})
    plan = make_plan(Recipe.parse(recipe_of(tmp_path)))
    assert list(plan.renamed) == [str(tmp_path / "b")] and not plan.dropped
    merged = load_all(Path(merge(recipe_of(tmp_path), tmp_path / "out")))
    assert set(merged) == set(a)
    for old, new in zip(one, two, strict=True):
        assert torch.equal(merged[old], ((a[old].double() + b[new].double()) / 2).float())


def test_a_rule_that_does_not_cover_all_is_not_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", tensors_of(1), {})
    save_checkpoint(tmp_path / "b", {**tensors_of(2, renamed("transformer.", "")), "new.weight": torch.ones(3)}, {})
    with pytest.raises(PlanError, match=r"b has new.weight") as refusal:
        make_plan(Recipe.parse(recipe_of(tmp_path)))
    assert "`tensors: common`" in str(refusal.value)
    plan = make_plan(Recipe.parse(recipe_of(tmp_path, tensors="common")))
    assert [name for _, name, _ in plan.dropped] == ["new.weight"]
    assert [job.method for job in plan.tensors] == ["linear"] * len(NAMES)


def test_equal_names_in_other_shapes_are_not_matched_by_a_rule(tmp_path: Path) -> None:
    other = {f"model.{name}": x.new_zeros(x.shape[::-1]) for name, x in tensors_of(2).items()}
    save_checkpoint(tmp_path / "a", tensors_of(1), {})
    save_checkpoint(tmp_path / "b", other, {})
    with pytest.raises(PlanError, match=r"begin with 'model.', as none of"):
        make_plan(Recipe.parse(recipe_of(tmp_path)))


def test_the_user_s_rules_come_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", tensors_of(1), {})
    save_checkpoint(tmp_path / "b", tensors_of(2, tuple("model." + name for name in NAMES)), {})
    recipe = recipe_of(tmp_path)
    recipe["models"][1]["rename"] = {"model.": ""}
    plan = make_plan(Recipe.parse(recipe))
    assert not plan.renamed and len(plan.tensors) == len(NAMES)
