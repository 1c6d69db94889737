"""The recipes of slices, modules and stages: their results against formulas, loaded and asked to generate."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from helpers_merges import Tensors, load_all
from oracles import assert_close, doubles

from mergekit_lfm import merge
from mergekit_lfm.output.lock import verify
from mergekit_lfm.runtime.load import load_model

transformers = pytest.importorskip("transformers")

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = {name: RECIPES / "quickstart" / name for name in ("base", "docs", "code")}


def prepare(script: str, models: str, recipe: str, folder: Path) -> None:
    """Put a recipe into the folder, and the models that a script makes for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, str(folder / models)])
        importlib.import_module(f"recipes.make.{script}").main()
    shutil.copy(RECIPES / recipe, folder)


def generate(folder: Path) -> list[int]:
    """The tokens with which a model goes on."""
    loaded: Any = load_model(folder, "lm", dtype="auto")
    prompt = loaded.tokenizer("Returns the", return_tensors="pt")
    ids: list[int] = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    return ids


def test_stacked_yaml_repeats_layers_that_add_nothing(tmp_path: Path) -> None:
    out = Path(merge(RECIPES / "stacked.yaml", tmp_path / "out", threads=1))
    assert verify(out) == []
    docs, merged = load_all(QUICKSTART["docs"]), load_all(out)
    layers = {f"model.layers.{to}.": f"model.layers.{layer}." for to, layer in enumerate((0, 1, 2, 1, 2))}
    expected = {name: x for name, x in docs.items() if ".layers." not in name}
    for to, old in layers.items():
        expected |= {name.replace(old, to): x for name, x in docs.items() if name.startswith(old)}
    ends = tuple(f"layers.{i}.{part}.weight" for i in (3, 4) for part in ("self_attn.o_proj", "mlp.down_proj"))
    expected |= {name: torch.zeros_like(x) for name, x in expected.items() if name.endswith(ends)}
    assert merged.keys() == expected.keys() and len(merged) == 5 * 9 + 2
    assert [name for name, x in expected.items() if not torch.equal(merged[name], x)] == []


def test_stacked_yaml_answers_as_its_source(tmp_path: Path) -> None:
    out = Path(merge(RECIPES / "stacked.yaml", tmp_path / "out", threads=1))
    model: Any = load_model(out, "lm", dtype="auto").model
    assert len(model.model.layers) == 5
    assert generate(out) == generate(QUICKSTART["docs"])


def test_three_stages_yaml_is_its_formula(tmp_path: Path) -> None:
    out = Path(merge(RECIPES / "three_stages.yaml", tmp_path / "out", threads=1))
    assert verify(out) == []
    assert {path.name for path in (tmp_path / "out.stages").iterdir()} == {"middle", "sum"}
    base, docs, code = (load_all(QUICKSTART[name]) for name in ("base", "docs", "code"))
    for name, x in load_all(out).items():
        xs = [doubles(each[name]) for each in (docs, code)]
        middle = oracles.slerp(xs, 0.5)
        summed = oracles.task_arithmetic(xs, [0.5, 0.5], doubles(base[name]))
        assert_close(x, oracles.linear([middle.value, summed.value], [1, 3]))
    assert len(generate(out)) > 4


@pytest.fixture(scope="module")
def vision(made_once: MadeOnce) -> Path:
    """A folder with the recipe and its models."""
    return made_once("vision", partial(prepare, "vision", "vision", "vision_language.yaml"))


def test_vision_language_yaml_is_a_formula_for_each_module(vision: Path, tmp_path: Path) -> None:
    out = Path(merge(vision / "vision_language.yaml", tmp_path / "out", threads=1))
    assert verify(out) == []
    models: dict[str, Tensors] = {name: load_all(vision / "vision" / name) for name in ("base", "charts", "photos")}
    merged, seen = load_all(out), dict[str, int]()
    assert merged.keys() == models["base"].keys()
    for name, x in merged.items():
        base, charts, photos = (doubles(models[each][name]) for each in ("base", "charts", "photos"))
        part = next((part for part in ("vision_tower", "multi_modal_projector") if part in name), "text")
        seen[part] = seen.get(part, 0) + 1
        if part == "text":
            weight = next((w for i, w in enumerate((0.5, 0.4, 0.3)) if f".layers.{i}." in name), 0.5)
            assert_close(x, oracles.task_arithmetic([charts, photos], [weight, weight], base))
        elif part == "vision_tower":
            assert_close(x, oracles.slerp([base, photos], 0.25))
        else:
            assert torch.equal(x, models["charts"][name])
    assert seen == {"vision_tower": 2 * 16 + 7, "multi_modal_projector": 4, "text": 3 * 9 + 3}
    loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[0, *[3] * 4, 7, 9]])
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = model.generate(input_ids=ids, pixel_values=image, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > ids.shape[1]


@pytest.fixture(scope="module")
def tokens(made_once: MadeOnce) -> Path:
    """A folder with the recipe and its models."""
    return made_once("tokens", partial(prepare, "tokens", "tokens", "three_tokenizers.yaml"))


def test_three_tokenizers_yaml_merges_rows_by_token(tokens: Path, tmp_path: Path) -> None:
    out = Path(merge(tokens / "three_tokenizers.yaml", tmp_path / "out", threads=1))
    assert verify(out) == []
    merged, folders = load_all(out), [tokens / "tokens" / name for name in ("base", "docs", "code")]
    own = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (*folders, out)]
    ids: list[dict[str, int]] = [each.get_vocab() for each in own]
    assert ids[3].keys() == ids[0].keys() | ids[1].keys() | ids[2].keys() and len(ids[3]) == len(ids[0]) + 4
    new = ("<|docs|>", "<|note|>", "<|code|>", "<|run|>")
    assert [own[3](text)["input_ids"][-1] for text in new] == [ids[3][text] for text in new]
    name = "model.embed_tokens.weight"
    rows = [doubles(load_all(folder)[name]) for folder in folders]
    for text, i in ids[3].items():
        known = [row[own_ids[text]] for row, own_ids in zip(rows, ids, strict=False) if text in own_ids]
        missing = sum(known) / len(known)
        each = [row[own_ids[text]] if text in own_ids else missing for row, own_ids in zip(rows, ids, strict=False)]
        expected = each[2] if text == "<|run|>" else 0.2 * each[0] + 0.4 * each[1] + 0.4 * each[2]
        assert torch.allclose(merged[name][i].double(), torch.as_tensor(expected), rtol=1 / 128, atol=1e-8), text
    assert len(generate(out)) > 4
