"""Recipes in the forms of public model cards: each is planned on stand-ins for its models, and a third of them run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers_merges import load_all
from helpers_public import MATRICES, PUBLIC, VECTORS, count_layers, names_in, put

from mergekit_lfm import merge
from mergekit_lfm.api.merge_plans import plan_merge
from mergekit_lfm.api.planned import PlannedMerge
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::mergekit_lfm.api.outcome.Finding")

PATHS = sorted(PUBLIC.glob("*.yaml"))
RUN = (
    *(
        "all_scopes",
        "cut_layers",
        "slerp_default_module",
        "dare_linear_base_last",
        "evolved_numbers",
        "passthrough_scaled",
        "slerp_chinese",
        "stack_anchors",
    ),
    *("stack_zeroed", "ties_bio", "vision_modules", "vision_slerp", "further_tokens", "stages_mega", "nuslerp_pair"),
    *("breadcrumbs_ties_gamma", "della_tuned", "stack_two_models", "ties_gradients", "model_and_adapter"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public")


def expected_names(path: Path) -> set[str]:
    """The tensors of the output, from the recipe's text alone."""
    *_, recipe = (data for data in yaml.safe_load_all(path.read_text("utf-8")) if data)
    names = sorted(names_in(recipe))
    stacked = recipe.get("slices") or recipe.get("modules", {}).get("default", {}).get("slices") or []
    ranges = [piece["sources"][0]["layer_range"] for piece in stacked]
    ends = [[int(x) for x in re.findall(r"\d+", str(each))] for each in ranges]
    count = sum(last - first for first, last in ends) or count_layers(names[0])
    parts = (*VECTORS, *MATRICES)
    text = "model.language_model" if "VL" in names[0] else "model"
    layers = {f"{text}.layers.{i}.{part}.weight" for i in range(count) for part in parts}
    vision = {f"model.visual.blocks.{i}.{part}.weight" for i in range(4) for part in ("attn.qkv", "attn.proj")}
    vision |= {f"model.visual.blocks.{i}.mlp.up_proj.weight" for i in range(4)}
    vision |= {"model.visual.patch_embed.proj.weight", "model.visual.merger.mlp.0.weight"}
    further = {f"mtp.layers.0.{part}.weight" for part in parts} | {"mtp.fc.weight"}
    others = {f"{text}.embed_tokens.weight", f"{text}.norm.weight", "lm_head.weight"}
    return layers | others | (vision if "VL" in names[0] else set()) | (further if "MTP" in names[0] else set())


def made_names(plan: Plan) -> set[str]:
    return {name for job in plan.tensors for name in job.names}


def test_there_are_forty() -> None:
    assert len(PATHS) >= 40 and {*RUN} <= {path.stem for path in PATHS}
    assert len(RUN) >= len(PATHS) / 3


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_public_recipe_is_planned(path: Path, root: Path) -> None:
    planned = plan_merge(put(path, root)).result
    assert made_names(planned.plan) == expected_names(path)


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem in RUN], ids=lambda path: path.stem)
def test_a_public_recipe_runs(path: Path, root: Path, tmp_path: Path) -> None:
    recipe = list(yaml.safe_load_all(path.read_text("utf-8")))[0 if path.stem != "stages_mega" else 1]
    out = Path(merge(put(path, root), tmp_path / "out"))
    assert verify(out) == []
    merged = load_all(out)
    assert merged.keys() == expected_names(path)
    assert {x.dtype for x in merged.values()} == {
        getattr(torch, (recipe.get("out_dtype") or recipe["dtype"]).removeprefix("torch."))
    }
    assert all(x.isfinite().all() for x in merged.values())


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\r\n")])
@pytest.mark.parametrize("stem", ["slerp_chinese", "ties_gradients", "stages_mega"])
def test_line_ends_and_byte_order_marks_change_nothing(stem: str, encoding: str, newline: str, root: Path) -> None:
    path = next(path for path in PATHS if path.stem == stem)
    digests = []
    for how in ((), (encoding, newline)):
        planned = plan_merge(put(path, root, *how)).result
        stages = planned.stages.plans if planned.stages else ()
        plans = [each for each in (*stages, planned) if isinstance(each, PlannedMerge)]
        digests.append([each.plan.recipe.normalised() for each in plans])
    assert digests[0] == digests[1]
