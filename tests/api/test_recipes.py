"""The recipes in recipes/: each says how to run it, is planned, runs on the quick start's checkpoints, and verifies."""

from __future__ import annotations

import re
import shutil
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.judge.evaluate import perplexity
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.tensors import TensorSpec, encode_header

RECIPES = Path(__file__).parents[2] / "recipes"
PATHS = sorted(RECIPES.glob("*.yaml"))
MINILM = RECIPES / "minilm.yaml"
# Their inputs are not in the repository, but made by a script that their opening comment names; other tests run them.
PREPARED = [path for path in PATHS if re.search("python (recipes/make/|tests/serve_)", path.read_text("utf-8"))]
# Recipes of several parts: test_parts_recipes.py runs them.
PARTS = [RECIPES / f"{name}.yaml" for name in ("stacked", "three_stages", "three_tokenizers", "vision_language")]
# Recipes of jobs: tests of their commands run them.
JOBS = [RECIPES / f"{name}.yaml" for name in ("experts", "extract", "heal", "healed", "offsite", "start", "tuned")]
RUNNABLE = [path for path in PATHS if path not in (*PREPARED, *PARTS, *JOBS)]


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", PATHS, ids=stem)
def test_the_opening_comment_has_the_command_that_runs_it(path: Path) -> None:
    opening = re.match(r"(#.*\n)+", path.read_text("utf-8"))
    assert opening is not None
    assert opening[0].count("\n") >= 4, "expected what it is for and when to choose it"
    assert re.findall(r"^# +merge recipes/(\S+)", opening[0], re.M) == [path.name]


def minilm_specs() -> list[TensorSpec]:
    """Names and shapes of all-MiniLM-L6-v2's 104 tensors."""
    vectors, matrices = {"embeddings.LayerNorm": 384}, {"pooler.dense": (384, 384)}
    for layer in (f"encoder.layer.{i}" for i in range(6)):
        matrices |= {f"{layer}.attention.self.{part}": (384, 384) for part in ("query", "key", "value")}
        matrices |= {f"{layer}.attention.output.dense": (384, 384), f"{layer}.intermediate.dense": (1536, 384)}
        matrices |= {f"{layer}.output.dense": (384, 1536)}
        vectors |= {f"{layer}{part}.output.LayerNorm": 384 for part in ("", ".attention")}
    rows = {"word": 30_522, "position": 512, "token_type": 2}
    shapes: dict[str, tuple[int, ...]] = {f"embeddings.{part}_embeddings.weight": (n, 384) for part, n in rows.items()}
    shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes |= {f"{name}.{part}": (n,) for name, n in vectors.items() for part in ("weight", "bias")}
    buffer = TensorSpec("embeddings.position_ids", (1, 512), "int64")
    return [buffer, *(TensorSpec(name, shape, "float32") for name, shape in shapes.items())]


def test_the_minilm_recipe_is_planned_on_stand_ins(tmp_path: Path) -> None:
    """A plan reads only headers: a hole of the right size follows them."""
    specs = minilm_specs()
    for name in ("base", "names", "details"):
        folder = tmp_path / "minilm" / name
        folder.mkdir(parents=True)
        header, _ = encode_header(specs, {})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    plan = make_plan(Recipe.load(shutil.copy(MINILM, tmp_path)))
    assert len(plan.tensors) == len(specs) == 104
    assert sum(prod(job.shape) for job in plan.tensors) == 22_713_728
    assert [job.name for job in plan.tensors if job.method != "task_arithmetic"] == ["embeddings.position_ids"]
    assert {tensor for _, tensor, _ in plan.dropped} == {"embeddings.position_ids"}  # of the fine-tunes


def test_every_method_has_a_recipe() -> None:
    """Its own, or that of a relative, with a comment that names it."""
    texts = [path.read_text("utf-8") for path in PATHS]
    named = set(re.findall(r"^merge_method: \w+ # or (\w+)", "\n".join(texts), re.M))
    tops = {stage.get("merge_method") for text in texts for stage in yaml.safe_load_all(text)}
    assert (tops - {None}) | named == METHODS.keys()


def test_every_recipe_that_needs_preparation_is_run_by_another_test() -> None:
    others = [
        path.read_text("utf-8") for path in Path(__file__).parents[1].rglob("test_*.py") if path != Path(__file__)
    ]
    assert [path.name for path in PREPARED if not any(path.name in text for text in others)] == []


class Run(NamedTuple):
    """The output of a recipe, and the tensors of the models it names."""

    recipe: Recipe
    out: Path
    merged: dict[str, torch.Tensor]
    inputs: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=RUNNABLE, ids=stem)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = Path(merge(request.param, tmp_path_factory.mktemp("recipes") / "out", threads=1))
    recipe = Recipe.load(request.param)
    inputs = [load_file(Path(str(model.source)) / "model.safetensors") for model in recipe.all_models]
    return Run(recipe, out, load_file(out / "model.safetensors"), inputs)


def test_the_recipe_runs_on_the_quick_start(run: Run) -> None:
    assert verify(run.out) == []
    assert {name: x.shape for name, x in run.merged.items()} == {name: x.shape for name, x in run.inputs[0].items()}
    assert {str(x.dtype) for x in run.merged.values()} == {f"torch.{run.recipe.dtype}"}
    assert all(x.isfinite().all() for x in run.merged.values())


def test_the_result_is_none_of_its_inputs_unless_it_is_a_copy(run: Run) -> None:
    merged = run.merged
    same = [all(torch.equal(merged[n], x.to(merged[n].dtype)) for n, x in model.items()) for model in run.inputs]
    assert any(same) == (run.recipe.merge_method == "passthrough")


def test_transformers_loads_the_result(run: Run) -> None:
    pytest.importorskip("transformers")
    loaded: Any = load_model(run.out, "lm", dtype="auto")
    assert str(loaded.model.dtype) == f"torch.{run.recipe.dtype}"
    prompt = loaded.tokenizer("Returns the", return_tensors="pt")
    with torch.no_grad():
        assert loaded.model(**prompt).logits.isfinite().all()


def test_forget_makes_the_base_worse_above_all_at_the_forgotten_task(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base, out = RECIPES / "quickstart" / "base", Path(merge(RECIPES / "forget.yaml", tmp_path / "out", threads=1))
    texts = [(RECIPES / "quickstart" / f"{domain}.txt").read_text("utf-8")[:8000] for domain in ("docs", "code")]
    docs, code = (perplexity(out, text).bits_per_byte - perplexity(base, text).bits_per_byte for text in texts)
    assert docs > 0.1
    assert code < docs / 2
