"""FP8 models: read as float32 by range, merged, and refused with the reason where they cannot be read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_llama import base_tensors, fine_tuned, load, save
from helpers_commands import refusal, run
from helpers_views import fp8_config, fp8_tensors, make_patch, plain_tensors, save_fp8, save_plain, spread
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.patched import patched_view
from mergekit_lfm.views.quantisation import dequantise
from mergekit_lfm.views.renamed import Renamed

Tensors = dict[str, torch.Tensor]


def values(tensors: Tensors, block: tuple[int, int] | None = (128, 128)) -> Tensors:
    """The values of FP8 tensors and scales: one product for each entry, float32."""
    return {
        name: x.float() * spread(scales.float(), x.shape, block)
        if (scales := tensors.get(f"{name}_scale_inv")) is not None
        else x
        for name, x in tensors.items()
        if not name.endswith("_scale_inv")
    }


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.read(name).view(checkpoint[name].shape)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose weights and scales are in different files, with blocks cut at the edges."""
    stored = open_checkpoint(save_fp8(tmp_path_factory.mktemp("models") / "fp8"))
    homes = {name: part.file for part in stored.layout for name in part.dtypes}
    assert homes["up.weight"] != homes["up.weight_scale_inv"]
    return stored


def test_values_are_float8_times_scale(fp8: Checkpoint) -> None:
    view = dequantise(fp8)
    expected = values(fp8_tensors(plain_tensors()))
    assert list(view) == [name for name in fp8 if name in expected] and view.keys() == expected.keys()
    for name, x in expected.items():
        assert view[name] == TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
        assert torch.equal(read(view, name), x)
        assert (view.location(name) is None) == (name in ("up.weight", "down.weight"))
    assert (expected["up.weight"] - plain_tensors()["up.weight"].float()).abs().max() < 0.2  # it is the model


@pytest.mark.parametrize("name", ["layer.up.weight", "layer.down.weight"])
def test_views_of_views_are_the_formula_for_any_range(fp8: Checkpoint, name: str) -> None:
    """A patch, on FP8, under other names: each entry's float8 times its scale, plus the product, rounded once."""
    plain = dequantise(Renamed(fp8, [RenameRule("re:^(up|down)", r"layer.\1")]))
    patch = make_patch(plain, (name,), rank=1)
    view = patched_view(plain, patch)
    x = values(fp8_tensors(plain_tensors()))[name.removeprefix("layer.")]
    left, right = patch.parts(name)
    expected = round_once(left.double() @ right.double() + x.double(), torch.float32).flatten()
    panel = (1 << 18) // x.shape[1] * x.shape[1]
    cuts = [(0, None), (1, 2), (127, 130), (panel - 1, panel + 1), (129, panel + 12345), (-3, None), (7, 7)]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda cut: (view.read(name, *cut), plain.read(name, *cut)), cuts * 2))
    for (first, last), (patched, alone) in zip(cuts * 2, parts, strict=True):
        assert torch.equal(patched, expected[first:last]) and torch.equal(alone, x.flatten()[first:last])


@pytest.mark.parametrize("block", [(128, 128), (1, 32), (64, 1000), None])
@pytest.mark.parametrize("shape", [(128, 256), (129, 127), (1, 1), (300, 5)])
def test_blocks_of_any_size(tmp_path: Path, block: tuple[int, int] | None, shape: tuple[int, int]) -> None:
    tensors = fp8_tensors({"w": torch.randn(shape, generator=torch.Generator().manual_seed(3))}, block)
    if block is None:
        tensors["w_scale_inv"] = tensors["w_scale_inv"].reshape(()).bfloat16()
    view = dequantise(open_checkpoint(save_checkpoint(tmp_path / "model", tensors, fp8_config(block))))
    assert torch.equal(read(view, "w"), values(tensors, block)["w"])
    assert torch.equal(view.read("w", 3, 4), values(tensors, block)["w"].flatten()[3:4])


@pytest.mark.slow
def test_transformers_reads_the_same_values(tmp_path: Path) -> None:
    """Its own code for such weights; it takes whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = fp8_tensors({"w": torch.randn(256, 384, generator=torch.Generator().manual_seed(3))})
    view = dequantise(open_checkpoint(save_checkpoint(tmp_path / "model", tensors, fp8_config())))
    theirs: Any = Fp8Dequantize(None)  # type: ignore[no-untyped-call]
    assert torch.equal(read(view, "w"), theirs._dequantize_one(tensors["w"], tensors["w_scale_inv"], torch.float32))


def test_only_the_rows_of_a_range_are_read(fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict[str, int]()

    def count(name: str, start: int, into: memoryview) -> None:
        counts[name] = counts.get(name, 0) + len(into)
        stored_read(name, start, into)

    stored_read = fp8.read_into
    monkeypatch.setattr(fp8, "read_into", count)
    dequantise(fp8).read("down.weight", 0, 10)
    rows = (1 << 18) // 301
    assert counts == {"down.weight": rows * 301, "down.weight_scale_inv": -(-rows // 128) * 3 * 4}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders a, a Llama in float32, and b, one in FP8 whose norms, head and embeddings are bfloat16."""
    monkeypatch.chdir(tmp_path)
    tensors = base_tensors(0)
    save(tmp_path / "a", tensors)
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    kept = {n: x.bfloat16() for n, x in fine_tuned(tensors, 1).items() if "layers" not in n or "norm" in n}
    linear = {n: x for n, x in fine_tuned(tensors, 1).items() if n not in kept}
    made = kept | fp8_tensors(linear, (32, 48))
    save_checkpoint(tmp_path / "b", made, config | fp8_config((32, 48)), shards=3)
    return tmp_path


def merge_of(*names: str, **more: Any) -> dict[str, Any]:
    lines = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, (1.0, 3.0), strict=False)]
    return {"merge_method": "linear", "models": lines, **more}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_fp8_model_is_merged(models: Path, dtype: str | None) -> None:
    """With a model in float32: the result has no scales, and is of the recipe's dtype, else float32."""
    recipe = merge_of("a", "b", **({} if dtype is None else {"dtype": dtype}))
    out = Path(merge(recipe, models / "out"))
    merged, a, b = load(out), load(models / "a"), values(load(models / "b"), (32, 48))
    assert merged.keys() == a.keys()
    for name, x in a.items():
        exact = (x.double() + 3 * b[name].double()) / 4
        near = 2**-8 if dtype else 2**-23
        assert merged[name].dtype == getattr(torch, dtype or "float32")
        torch.testing.assert_close(merged[name].double(), exact, rtol=near, atol=1e-9)
    assert verify(out) == []
    dropped = json.loads((out / "merge.lock.json").read_text())["dropped"]
    assert {x["tensor"] for x in dropped} == {name for name in load(models / "b") if name.endswith("_scale_inv")}
    reason = "the scales of a weight, which is read as float32 with them"
    assert {(x["model"], x["reason"]) for x in dropped} == {("b", reason)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_template_in_fp8_leaves_no_trace_of_it(models: Path, dtype: str) -> None:
    """One model, read and written in another dtype: its config names no quantisation."""
    out = Path(merge(merge_of("b", dtype=dtype), models / "out"))
    expected = values(load(models / "b"), (32, 48))
    assert {name: x.dtype for name, x in load(out).items()} == dict.fromkeys(expected, getattr(torch, dtype))
    assert all(torch.equal(x, expected[name].to(x.dtype)) for name, x in load(out).items())
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, models / "b"))
    del before["quantization_config"]
    assert config == {**before, "torch_dtype": dtype, "dtype": dtype}


@pytest.mark.usefixtures("models")
def test_without_a_dtype_the_widest_holds() -> None:
    """FP8 counts as float32: matrices come out in it, and norms, bfloat16 in the only model, in theirs."""
    plan = make_plan(Recipe.parse(merge_of("b")))
    dtypes = {job.name: job.dtype for job in plan.tensors}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == "float32" and dtypes["model.norm.weight"] == "bfloat16"
    assert all(shard.name != part.file for part in plan.models[0].layout for shard in plan.shards)


def test_the_digest_depends_on_the_block_size(models: Path) -> None:
    """A config that is not the output's can change the values."""
    recipe = Recipe.parse(merge_of("a", "b"))
    before = make_plan(recipe).digest
    config = json.loads((models / "b" / "config.json").read_text())
    assert make_plan(recipe).models[1].identity[0] == {
        "view": {"dequantised": {"quant_method": "fp8", "weight_block_size": [32, 48]}}
    }
    config["quantization_config"]["weight_block_size"] = [33, 48]
    (models / "b" / "config.json").write_text(json.dumps(config))
    assert make_plan(recipe).digest != before


def test_passthrough_copies_it_as_it_is(models: Path) -> None:
    out = Path(merge({"merge_method": "passthrough", "models": [{"model": "b"}]}, models / "out"))
    before, after = load(models / "b"), load(out)
    assert all(torch.equal(x.view(torch.uint8), after[name].view(torch.uint8)) for name, x in before.items())
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_an_fp8_model_is_renamed_and_aligned(models: Path) -> None:
    """As the same model saved in float32 is, to the bit."""
    expected = values(load(models / "b"), (32, 48))
    save_checkpoint(models / "c", expected, json.loads((models / "a" / "config.json").read_text()))
    changed = {name.replace("model.", "m."): x for name, x in load(models / "b").items()}
    config = json.loads((models / "b" / "config.json").read_text())
    save_checkpoint(models / "d", changed, config)
    results = []
    models_of: list[dict[str, Any]] = [{"model": "c"}, {"model": "d", "rename": {"m.": "model."}}]
    for i, line in enumerate(models_of):
        lines = [{"model": "a"}, {**line, "align": {"to": "a"}}]
        recipe = {"merge_method": "linear", "models": lines, "parameters": {"weight": 1}}
        results.append(load(Path(merge(recipe, models / f"out{i}"))))
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


UP, SCALE = "up.weight", "up.weight_scale_inv"


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({SCALE: None}, {}, f"{UP} [301, 901] float8_e4m3fn has no {SCALE}"),
        ({SCALE: torch.ones(3, 9)}, {}, f"has {SCALE} [3, 9] float32, expected [3, 8] for blocks [128, 128]"),
        ({SCALE: torch.ones(3, 8).int()}, {}, f"has {SCALE} [3, 8] int32, expected one of float32"),
        ({UP: None}, {}, f"{SCALE} is the scale of no float8_e4m3fn tensor"),
        ({UP: torch.ones(301, 901).to(torch.float8_e5m2)}, {}, f"{UP} [301, 901] float8_e5m2 is not float8_e4m3fn"),
        ({"v": torch.ones(3).to(torch.float8_e4m3fn)}, {}, "v [3] float8_e4m3fn is not a matrix"),
        ({}, {"fmt": "e5m2"}, "fmt 'e5m2' in its config.json, expected 'e4m3'"),
        ({}, {"weight_block_size": [128]}, "weight_block_size [128] in its config.json, expected [rows, columns]"),
        ({}, {"weight_block_size": None}, f"has {SCALE} [3, 8] float32, expected one number"),
        ({}, {"quant_method": "gptq"}, "quant_method 'gptq' in its config.json; can be read: fp8"),
    ],
)
def test_other_quantised_models_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_plain(tmp_path / "a", torch.float32)
    tensors = {name: x for name, x in (fp8_tensors(plain_tensors()) | changes).items() if x is not None}
    full = {"quantization_config": fp8_config()["quantization_config"] | config}
    save_checkpoint(tmp_path / "b", tensors, full)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge_of("a", "b")))
    text = refusal(run("merge", "recipe.yaml", "out"))
    assert "b is quantised" in text and message in text
    assert "merge the unquantised models, or dequantise them first" in text
    assert not (tmp_path / "out").exists()


def test_scales_of_activations_are_used_up_too(tmp_path: Path) -> None:
    tensors = fp8_tensors({"h.weight": torch.ones(4, 6)}, None) | {"h.activation_scale": torch.ones(())}
    tensors["h.weight_scale_inv"] = tensors["h.weight_scale_inv"].reshape(())
    view = dequantise(open_checkpoint(save_checkpoint(tmp_path / "model", tensors, fp8_config(None))))
    assert list(view) == ["h.weight"]
    assert sorted(view.dropped) == ["h.activation_scale", "h.weight_scale_inv"]


def test_the_view_runs_as_a_model(models: Path) -> None:
    """For edits of facts: the same outputs as of the model saved in float32, without a GPU."""
    save_checkpoint(models / "c", values(load(models / "b"), (32, 48)), open_checkpoint(models / "a").config)
    ids = torch.arange(6)[None]
    view = load_model(dequantise(open_checkpoint(models / "b")), "lm")
    with torch.inference_mode():
        assert torch.equal(view.model(ids).logits, load_model(models / "c", "lm").model(ids).logits)


@pytest.mark.usefixtures("models")
def test_of_many_scales_the_plan_shows_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path("recipe.yaml")
    recipe.write_text(yaml.safe_dump(merge_of("a", "b")))
    every = [line for line in run("plan", "recipe.yaml", "out").output.splitlines() if line.startswith("dropped: b: ")]
    assert len(every) == 14
    monkeypatch.setattr("mergekit_lfm.commands.show.plans.SHOWN_DROPPED", 3)
    some = [line for line in run("plan", "recipe.yaml", "out").output.splitlines() if line.startswith("dropped: b: ")]
    assert some[:3] == every[:3] and some[3:] == [f"dropped: b: 11 more: {every[0].split(': ')[-1]}"]
