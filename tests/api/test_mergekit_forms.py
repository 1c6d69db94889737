"""Cases of mergekit's language about parameters, slices, dtypes and files. The names have the cases' numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llama import Tensors, load
from helpers_mergekit import World
from helpers_text import transformers
from helpers_views import fp8_config, fp8_tensors
from models import save_checkpoint
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import verify

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OUTSIDE = (EMBEDDING, NORM, HEAD)
Run = Callable[..., Tensors]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("forms"))


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    """Merges a recipe and loads the result."""
    return world.runner(tmp_path)


def linear_of(*weights: str) -> str:
    """A linear merge of A, B, ... with these settings of their weights."""
    lines = (f"{{model: {name}, parameters: {{weight: {own}}}}}" for name, own in zip("ABC", weights, strict=False))
    return f"{{merge_method: linear, models: [{', '.join(lines)}]}}"


def share_of_b(merged: Tensors, world: World, name: str) -> float:
    """The share of B in a tensor that is a weighted mean of A and B."""
    a, b = world["A"][name].double(), world["B"][name].double()
    share = (((merged[name].double() - a) * (b - a)).sum() / (b - a).square().sum()).item()
    torch.testing.assert_close(merged[name].double(), (1 - share) * a + share * b, atol=1e-6, rtol=0)
    return round(share, 4)


# ------------------------------------------------------------------ parameters


def test_b01_gradients_begin_for_all_that_is_in_no_layer(run: Run, world: World) -> None:
    merged = run(linear_of("[1, 0]", "[0, 1]"))
    for name, x in merged.items():
        assert torch.equal(x, world["B" if ".1." in name else "A"][name])


def test_b03_filters_with_gradients(run: Run, world: World) -> None:
    rules = "[{filter: self_attn, value: [0, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]"
    merged = run(
        f"{{merge_method: slerp, base_model: A, models: [{{model: A}}, {{model: B}}], parameters: {{t: {rules}}}}}"
    )
    ends = {"0.self_attn": "A", "1.self_attn": "B", "0.mlp": "B", "1.mlp": "A"}
    for place, model in ends.items():
        names = [name for name in merged if place in name]
        assert names and all(torch.equal(merged[name], world[model][name]) for name in names)
    assert not torch.equal(merged[EMBEDDING], world["A"][EMBEDDING])


def test_b05_filters_are_substrings(run: Run, world: World, tmp_path: Path) -> None:
    merged = run(linear_of("[{filter: layers.1.mlp, value: 0}, {filter: '*', value: 1}]", "1"))
    shares = {name: share_of_b(merged, world, name) for name in merged}
    assert shares == {name: 1.0 if "layers.1.mlp" in name else 0.5 for name in merged}
    (tmp_path / "none").mkdir()
    text = linear_of("[{filter: 'layers\\.\\d+', value: 0}, {value: 1}]", "1")
    assert "is part of no tensor's name" in world.refuse(text, tmp_path / "none" / "out")


def test_b07_the_nearest_scope_holds(run: Run, world: World) -> None:
    """Of the second model a weight in each scope: 1 at the top, 3 in the module, 7 in the slice, 15 at the source."""

    def recipe(depth: int) -> str:
        top, module, piece, source = (
            f"parameters: {{weight: {[1, own][depth >= level]}}}" if depth >= level else "parameters: {}"
            for level, own in enumerate((1, 3, 7, 15))
        )
        return (
            f"{{merge_method: linear, {top}, modules: {{model: {{{module}, slices: [{{{piece}, sources: ["
            f"{{model: A, layer_range: [0, 2], parameters: {{weight: 1}}}}, {{model: B, layer_range: [0, 2], {source}}}"
            "]}]}, lm_head: {models: [{model: A}]}}}"
        )

    shares = []
    for depth in range(4):
        merged = run(recipe(depth))
        (share,) = {share_of_b(merged, world, name) for name in merged if name != HEAD}
        assert torch.equal(merged[HEAD], world["A"][HEAD])
        shares.append(share)
    assert shares == [0.5, 0.75, 0.875, 0.9375]


def test_b09_slips_of_the_pen(world: World, tmp_path: Path) -> None:
    line = "{model: A, parameters: {weight: 1, densty: 0.5}}"
    message = world.refuse(
        f"{{merge_method: ties, base_model: BASE, models: [{line}], bogus_key: 1}}", tmp_path / "out"
    )
    assert "densty" in message and "did you mean density?" in message and "bogus_key" in message


# ------------------------------------------------------------------ slices and modules


def llama_like(kind: str, folder: Path, seed: int, **more: Any) -> Path:
    """A tiny random model of one of transformers' classes that are like a Llama."""
    transformers.set_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma3Text"])
def test_b11_stacks_are_loaded(kind: str, tmp_path: Path) -> None:
    llama_like(kind, tmp_path / "a", 0)
    pieces = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": span}]} for span in ([0, 3], [1, 4])]
    out = Path(merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 6 == len(config.get("layer_types") or range(6))
    loaded: Any
    loaded, info = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM").from_pretrained(
        out, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(loaded.model.layers) == 6


@pytest.mark.parametrize("span", ["[1, 5]", "[-1, 1]", "[2, 0]", "[0, 0]", "[0]", "[0.5, 2]"])
def test_b13_ranges_that_do_not_fit(span: str, world: World, tmp_path: Path) -> None:
    text = f"{{merge_method: passthrough, slices: [{{sources: [{{model: A, layer_range: {span}}}]}}]}}"
    message = world.refuse(text, tmp_path / "out")
    assert "slices[0].sources[0].layer_range" in message and span in message


def test_b15_slices_of_different_lengths(world: World, tmp_path: Path) -> None:
    sources = "[{model: L47, layer_range: [0, 2]}, {model: L48, layer_range: [0, 3]}]"
    message = world.refuse(
        f"{{merge_method: linear, parameters: {{weight: 1}}, slices: [{{sources: {sources}}}]}}", tmp_path / "out"
    )
    assert "slices[0].sources" in message and "[0, 2], [0, 3]" in message


@pytest.mark.parametrize("vision", ["A", "B"])
@pytest.mark.parametrize("form", ["models: [{model: %s}]", "slices: [{sources: [{model: %s, layer_range: [0, 2]}]}]"])
def test_b17_modules_of_one_model_are_copied(vision: str, form: str, tmp_path: Path) -> None:
    draw, models = torch.Generator().manual_seed(0), dict[str, Tensors]()
    names = [f"model.{stack}.{i}.w" for stack in ("language_model.layers", "visual.blocks") for i in range(2)]
    for model in "AB":
        models[model] = {name: torch.randn(4, 4, generator=draw) for name in names}
        save_checkpoint(tmp_path / "in" / model, models[model], {"model_type": "qwen2_5_vl"})
    text = (
        "{merge_method: slerp, base_model: A, modules: {text_decoder: {models: [{model: A}, {model: B}], parameters: "
        f"{{t: 1}}}}, vision_tower: {{{form % vision}}}}}}}"
    )
    (tmp_path / "in" / "recipe.yaml").write_text(text)
    merged = load(Path(merge(tmp_path / "in" / "recipe.yaml", tmp_path / "out")))
    assert merged.keys() == set(names)
    for name, x in merged.items():
        assert torch.equal(x, models[vision if "visual" in name else "B"][name])


def test_b19_references_as_mappings(run: Run) -> None:
    text = linear_of("1", "3")
    other = text.replace("{model: A,", "{model: {model: {path: A}},").replace("{model: B,", "{model: {path: B},")
    assert other != text
    one, two = run(text), run(other)
    assert all(torch.equal(x, two[name]) for name, x in one.items())


# ------------------------------------------------------------------ dtypes and configs


def test_c01_out_dtype(run: Run, world: World, tmp_path: Path) -> None:
    text = linear_of("1", "3").replace("}]}", "}], dtype: float32, out_dtype: bfloat16}")
    merged = run(text)
    for name, x in merged.items():
        expected = (world["A"][name].double() + 3 * world["B"][name].double()) / 4
        assert x.dtype == torch.bfloat16 and torch.equal(x, expected.float().bfloat16())
    (out,) = tmp_path.iterdir()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "float8_e4m3fn", "int4"])
def test_c03_names_of_dtypes(dtype: str, world: World, tmp_path: Path) -> None:
    message = world.refuse(linear_of("1", "2").replace("}]}", f"}}], dtype: {dtype}}}"), tmp_path / "out")
    assert "dtype" in message and dtype in message


def tied_or_not(folder: Path, tied: tuple[bool, bool], base: str) -> dict[str, Any]:
    """A recipe of two models that tie their heads, or do not."""
    for seed, (name, is_tied) in enumerate(zip("ab", tied, strict=True)):
        llama_like("Llama", folder / name, seed, tie_word_embeddings=is_tied)
    models = [{"model": str(folder / name)} for name in "ab"]
    return {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "base_model": str(folder / base),
        "models": models,
    }


@pytest.mark.parametrize(("tied", "base"), [((True, True), "a"), ((False, False), "a"), ((True, False), "b")])
def test_c13_the_config_agrees_with_the_head(tied: tuple[bool, bool], base: str, tmp_path: Path) -> None:
    """The embedding of a tied model counts as its head."""
    out = Path(merge(tied_or_not(tmp_path, tied, base), tmp_path / "out"))
    merged, config = load(out), json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == all(tied) == (HEAD not in merged)
    heads = [load(tmp_path / name) for name in "ab"]
    expected = sum(each.get(HEAD, each[EMBEDDING]).double() for each in heads) / 2
    assert torch.equal(merged.get(HEAD, merged[EMBEDDING]), torch.as_tensor(expected).float())


def test_c13_a_head_that_a_tied_base_lacks(tmp_path: Path) -> None:
    """It is refused, or kept where the recipe says so, with a config that has loaders read it."""
    recipe = tied_or_not(tmp_path, (True, False), "a")
    with pytest.raises(PlanError, match=r"b has lm_head\.weight .*, which .*a lacks"):
        merge(recipe, tmp_path / "out")
    out = Path(merge({**recipe, "keep": {"lm_head": str(tmp_path / "b")}}, tmp_path / "out"))
    assert torch.equal(load(out)[HEAD], load(tmp_path / "b")[HEAD])
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight.detach(), load(out)[HEAD])


def test_c17_relative_paths_without_a_network(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(world.folder)
    Path("relative.yaml").write_text(linear_of("1", "2"))
    assert verify(Path(merge("relative.yaml", tmp_path / "out"))) == []


# ------------------------------------------------------------------ inputs


def save_changed(world: World, folder: Path, change: Callable[[Tensors], object], name: str = "B") -> None:
    """A and a changed copy of another model, as `A` and `B` in the folder."""
    tensors = dict(world[name])
    change(tensors)
    config = json.loads((world.folder / "A" / "config.json").read_text())
    save_checkpoint(folder / "A", world["A"], config)
    save_checkpoint(folder / "B", tensors, config)


def mean_of(folder: Path, out: Path, **more: Any) -> Tensors:
    """The mean of A and B in the folder."""
    models = [{"model": str(folder / name)} for name in "AB"]
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "models": models, **more}
    return load(Path(merge(recipe, out)))


def test_d01_all_missing_tensors_are_named(world: World, tmp_path: Path) -> None:
    lost = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    save_changed(world, tmp_path, lambda tensors: [tensors.pop(name) for name in lost])
    with pytest.raises(PlanError) as caught:
        mean_of(tmp_path, tmp_path / "out")
    assert all(f"B lacks {name}" in str(caught.value) for name in lost) and not (tmp_path / "out").exists()


def test_d03_biases_are_merged(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for seed, name in enumerate("AB"):
        folder = llama_like("Llama", tmp_path / name, seed, attention_bias=True)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {n: torch.randn(x.shape, generator=draw) for n, x in tensors.items() if n.endswith("bias")}
        config = json.loads((folder / "config.json").read_text())
        save_checkpoint(tmp_path / "in" / name, tensors, config)
    merged = mean_of(tmp_path / "in", tmp_path / "out")
    a, b = (load(tmp_path / "in" / name) for name in "AB")
    assert merged.keys() == a.keys() and sum(name.endswith("bias") for name in merged) == 16
    for name, x in merged.items():
        assert torch.equal(x, ((a[name].double() + b[name].double()) / 2).float())


def test_d05_fp8_is_dequantised(world: World, tmp_path: Path) -> None:
    config = json.loads((world.folder / "A" / "config.json").read_text())
    quantised = fp8_tensors(world["A"], (32, 32))
    save_checkpoint(tmp_path / "A", quantised, config | fp8_config((32, 32)))
    save_checkpoint(tmp_path / "B", {n: x.bfloat16() for n, x in world["B"].items()}, config)
    merged = mean_of(tmp_path, tmp_path / "out", dtype="float32")
    assert merged.keys() == world["A"].keys()
    for name, x in merged.items():
        scales = quantised.get(f"{name}_scale_inv")
        a = quantised[name].double()
        if scales is not None:
            a = a * scales.double().repeat_interleave(32, 0).repeat_interleave(32, 1)[: a.shape[0], : a.shape[1]]
        torch.testing.assert_close(x.double(), (a + world["B"][name].bfloat16().double()) / 2, atol=1e-7, rtol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_d07_nan_is_reported_with_its_tensor(world: World, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[NORM] = tensors[NORM].clone()
        tensors[NORM][3] = torch.nan

    save_changed(world, tmp_path, spoil)
    with pytest.raises(Exception, match=NORM):
        mean_of(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_d09_experts_keep_their_names(kind: str, tmp_path: Path) -> None:
    sizes = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16}}[kind]
    for seed, name in enumerate("AB"):
        llama_like(kind, tmp_path / name, seed, num_experts_per_tok=2, **sizes)
    merged = mean_of(tmp_path, tmp_path / "out")
    a, b = load(tmp_path / "A"), load(tmp_path / "B")
    assert merged.keys() == a.keys() and any("experts.3." in name for name in merged)
    for name, x in merged.items():
        assert torch.equal(x, ((a[name].double() + b[name].double()) / 2).float())
    model = getattr(transformers, f"{kind}ForCausalLM")
    _, info = model.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_d11_other_architectures_are_refused(world: World, tmp_path: Path) -> None:
    save_changed(world, tmp_path, lambda _: None)
    config = json.loads((tmp_path / "B" / "config.json").read_text())
    (tmp_path / "B" / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(PlanError, match=r"model_type is mistral in .*B, llama in .*A(.|\n)*allow: \[model_type\]"):
        mean_of(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 2])
def test_d13_bin_files(shards: int, world: World, tmp_path: Path) -> None:
    expected = mean_of(world.folder, tmp_path / "expected")
    for name in "AB":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((world.folder / name / "config.json").read_bytes())
        names = list(world[name])
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        for i, file in enumerate(files if shards > 1 else ["pytorch_model.bin"]):
            torch.save({n: world[name][n] for n in names[i::shards]}, tmp_path / name / file)
        weight_map = {n: files[i % shards] for i, n in enumerate(names)}
        if shards > 1:
            index = json.dumps({"metadata": {}, "weight_map": weight_map})
            (tmp_path / name / "pytorch_model.bin.index.json").write_text(index)
    merged = mean_of(tmp_path, tmp_path / "out")
    assert merged.keys() == expected.keys() and all(torch.equal(x, expected[n]) for n, x in merged.items())


def test_d19_layers_that_come_twice(run: Run, world: World) -> None:
    source = "{model: A, layer_range: [0, 2]}"
    merged = run(f"{{merge_method: passthrough, slices: [{{sources: [{source}]}}, {{sources: [{source}]}}]}}")
    assert len(merged) == 4 * 9 + 3
    for name, x in merged.items():
        original = name.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")
        assert torch.equal(x, world["A"][original])
