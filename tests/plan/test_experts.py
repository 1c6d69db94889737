"""Mixtures of experts in different layouts are merged in that of the template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_merges import Tensors, average, load_all, load_complete
from models import save_checkpoint
from safetensors.torch import save_file

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.views.experts import Regrouped

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
SIZES |= {"num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FEW = {"moe_intermediate_size": 8, "num_experts": 4}
# DeepSeek-V3's first layer has no experts.
DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES: dict[str, Mapping[str, Any]] = {
    "MixtralForCausalLM": SIZES | {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": SIZES | FEW,
    "OlmoeForCausalLM": SIZES | FEW,
    "DeepseekV3ForCausalLM": SIZES | FEW | DEEPSEEK | {"head_dim": 4},
    "JambaForCausalLM": SIZES | {"num_experts": 4, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
}


def build(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, kind)
    return model(model.config_class(**FAMILIES[kind])).eval()


def save_both(folder: Path, kind: str, seed: int) -> Any:
    """A random model, as transformers saves it in `apart`, and as it holds it in `together`."""
    model = build(kind, seed)
    model.save_pretrained(folder / "apart")
    config = json.loads((folder / "apart" / "config.json").read_text())
    save_checkpoint(folder / "together", model.state_dict(), config)
    return model


def recipe_of(*models: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 1 + 2 * i}} for i, model in enumerate(models)]
    return {"merge_method": "linear", "models": entries, **more}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[1, 7, 8, 9, 10], [1, 11, 12, 13, 14]])).logits
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_both_layouts_merge_in_that_of_the_first(kind: str, tmp_path: Path) -> None:
    a, b = save_both(tmp_path / "a", kind, 0), save_both(tmp_path / "b", kind, 1)
    expected = average(a.state_dict(), b.state_dict(), torch.float32)
    a.load_state_dict(expected)
    wanted = outputs(a)
    for first, second in (("apart", "together"), ("together", "apart")):
        recipe = recipe_of(tmp_path / "a" / first, tmp_path / "b" / second)
        out = Path(merge(recipe, tmp_path / first))
        alike = load_all(Path(merge(recipe_of(tmp_path / "a" / first, tmp_path / "b" / first), tmp_path / f"{first}2")))
        merged = load_all(out)
        assert merged.keys() == alike.keys() == load_all(tmp_path / "a" / first).keys()
        assert all(torch.equal(merged[name], x) for name, x in alike.items())
        torch.testing.assert_close(outputs(load_complete(kind, out)), wanted, rtol=1e-4, atol=1e-6)
        (note,) = make_plan(Recipe.parse(recipe)).notices
        assert note.startswith(f"{tmp_path / 'b' / second}: its experts are stored ") and "experts.gate_up_proj" in note


E, INNER, HIDDEN = 3, 5, 7
FUSED, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def apart(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(shape, generator=draw)
        for e in range(E)
        for name, shape in shapes.items()
    } | {"model.norm.weight": torch.randn(HIDDEN, generator=draw)}


def together(tensors: Tensors) -> Tensors:
    """By torch, as transformers holds them."""
    one = [
        [tensors[f"model.layers.0.mlp.experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")] for e in range(E)
    ]
    norm = {"model.norm.weight": tensors["model.norm.weight"]}
    return {
        FUSED: torch.stack([torch.cat([gate, up]) for gate, up, _ in one]),
        DOWN: torch.stack([down for *_, down in one]),
    } | norm


def turned(tensors: Tensors) -> Tensors:
    return {name: x.transpose(1, 2).contiguous() if x.ndim == 3 else x for name, x in together(tensors).items()}


FORMS: dict[str, Callable[[Tensors], Tensors]] = {"apart": dict, "together": together, "turned": turned}


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_every_form_is_read_as_every_other(template: str, other: str, tmp_path: Path) -> None:
    a, b = apart(0), apart(1)
    save_checkpoint(tmp_path / "a", FORMS[template](a), {})
    save_checkpoint(tmp_path / "b", FORMS[other](b), {})
    merged = load_all(Path(merge(recipe_of(tmp_path / "a", tmp_path / "b"), tmp_path / "out")))
    for name, expected in average(FORMS[template](a), FORMS[template](b), torch.float32).items():
        torch.testing.assert_close(merged[name], expected, rtol=2e-7, atol=2e-7)
    copied = recipe_of(tmp_path / "b", merge_method="passthrough", base_model=str(tmp_path / "a"))
    del copied["models"][0]["parameters"]
    copied["modules"] = {"model": {"models": copied.pop("models")}}
    out = load_all(Path(merge(copied, tmp_path / "copied")))
    assert out.keys() == FORMS[template](b).keys()
    assert all(torch.equal(out[name], x) for name, x in FORMS[template](b).items())


def test_a_matrix_of_one_expert_is_a_range_of_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", apart(0), {})
    save_checkpoint(tmp_path / "b", together(apart(1)), {})
    view = make_plan(Recipe.parse(recipe_of(tmp_path / "a", tmp_path / "b"))).models[1]
    assert isinstance(view, Regrouped)
    assert all(view.maker(name) is None and view.location(name) is not None for name in view)


def test_an_unknown_layout_is_refused_with_its_names(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", apart(0), {})
    fused = together(apart(1))
    fused["model.layers.0.mlp.experts.wi"] = fused.pop(FUSED)
    save_checkpoint(tmp_path / "b", fused, {})
    with pytest.raises(
        PlanError, match=r"experts\.\d\.\w+\.weight is a part of one, \S*experts\.\w+ all of a layer.*experts\.py"
    ):
        make_plan(Recipe.parse(recipe_of(tmp_path / "a", tmp_path / "b")))


@pytest.mark.parametrize("change", ["bias", "dtype", "expert"])
def test_a_layout_in_part_is_refused(change: str, tmp_path: Path) -> None:
    """gpt-oss interleaves gate and up, and has biases; the experts of a layer have one dtype and are all there."""
    tensors, fused = apart(0), together(apart(1))
    if change == "bias":
        fused[f"{FUSED}_bias"] = torch.zeros(E, 2 * INNER)
    elif change == "dtype":
        fused[DOWN] = fused[DOWN].bfloat16()
    else:
        del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    save_checkpoint(tmp_path / "a", tensors, {})
    save_checkpoint(tmp_path / "b", fused, {})
    with pytest.raises(PlanError, match="different layouts"):
        make_plan(Recipe.parse(recipe_of(tmp_path / "a", tmp_path / "b")))


@pytest.mark.parametrize("first", ["apart", "together"])
def test_an_adapter_on_one_expert_alone_goes_with_a_model_that_has_all_in_one_tensor(
    first: str, tmp_path: Path
) -> None:
    """The experts that the adapter leaves alone stay bfloat16, and are read beside the changed one in float32."""
    model = build("MixtralForCausalLM", 0).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "apart")
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    save_checkpoint(tmp_path / "together", model.state_dict(), config)
    name = "model.layers.0.block_sparse_moe.experts.2.w1"
    stored = load_all(tmp_path / "apart")
    a, b = torch.randn(2, 16), torch.randn(24, 2)
    lora = tmp_path / "lora"
    lora.mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    adapted = {"model": str(tmp_path / "apart"), "adapter": str(lora), "parameters": {"weight": 1}}
    plain = {"model": str(tmp_path / "together"), "parameters": {"weight": 1}}
    models = [adapted, plain] if first == "apart" else [plain, adapted]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    out = load_all(tmp_path / "out")
    expected = (stored[f"{name}.weight"].double() + (b.double() @ a.double()) / 2).bfloat16()
    gate_up = "model.layers.0.mlp.experts.gate_up_proj"
    found = out[f"{name}.weight"] if first == "apart" else out[gate_up][2, :24]
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
    together = model.state_dict()[gate_up]
    other = out[name.replace("experts.2", "experts.1") + ".weight"] if first == "apart" else out[gate_up][1, :24]
    assert torch.equal(other, together[1, :24])
