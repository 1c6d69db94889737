"""Adapters in the forms in which other programs leave them: read by their formulas, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lfm import PlanError
from mergekit_lfm.views.adapted import open_model

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm"
ATTENTION = [f"down_blocks.0.attentions.0.attn1.{name}" for name in ("to_q", "to_out.0")]  # of diffusers' U-Nets
PEFT = f"base_model.model.{Q}"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


A, B = draw(2, 8), draw(8, 2)
LORA: Mapping[str, Tensor] = {f"{PEFT}.lora_A.weight": A, f"{PEFT}.lora_B.weight": B}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Some tensors of a Llama, in float64."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {f"{Q}.weight": draw(8, 8).T.contiguous(), "model.layers.0.mlp.down_proj.weight": draw(8, 12)}
    tensors |= {f"{name}.weight": draw(8, 8) for name in (*ATTENTION, "x.lora_A", "y.a_b", "y_a.b")}
    tensors |= {"model.conv.weight": draw(4, 3, 2, 2)}
    tensors |= {f"{NORM}.weight": draw(8), f"{NORM}.alpha": draw(1)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def write(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """Write a file of an adapter, each tensor on memory of its own."""
    file.parent.mkdir(exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, file, metadata=metadata or None)
    return file


def folder_of(file: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """The folder of a file, with a config beside it."""
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    return file.parent


def check(base: Path, adapter: object, changes: Mapping[str, Tensor]) -> None:
    """Assert that an adapter makes these changes, by the names of tensors, and no other."""
    view, model = open_model(f"{base}+{adapter}"), open_model(base)
    assert {name for name in model if view.digest_of(name) != model.digest_of(name)} == {*changes}
    for name, change in changes.items():
        torch.testing.assert_close(view.read(name) - model.read(name), change.flatten(), rtol=1e-12, atol=1e-12)


def test_the_file_of_a_folder_has_the_folders_config(base: Path, tmp_path: Path) -> None:
    """Without it the scale of PEFT's tensors is not known."""
    file = write(tmp_path / "adapter/adapter_model.safetensors", LORA)
    folder_of(file)
    check(base, file, {f"{Q}.weight": 4 * B @ A})
    (tmp_path / "adapter/adapter_config.json").unlink()
    with pytest.raises(PlanError, match=r"adapter has no adapter_config\.json"):
        open_model(f"{base}+{file}")
    with pytest.raises(PlanError, match=r"alone\.safetensors is PEFT's, .* put that beside it"):
        open_model(f"{base}+{write(tmp_path / 'alone.safetensors', LORA)}")


def test_a_file_with_two_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    """Neither of them is lost in silence."""
    for end in ("lora_A", "modules_to_save"):
        names = (f"{PEFT}.{end}.{name}.weight" for name in ("default", "other"))
        adapter = folder_of(write(tmp_path / end / "adapter_model.safetensors", dict.fromkeys(names, A)))
        with pytest.raises(PlanError, match=r"has two tensors for one: \S+default\.weight and \S+other\.weight"):
            open_model(f"{base}+{adapter}")


HADA = {f"hada_w{i}_{end}": x for i in (1, 2) for end, x in (("a", B), ("b", A))}
STRANGE: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor], str]] = {
    "another kind in a LoRA": (CONFIG, {f"{PEFT}.{part}": x for part, x in HADA.items()}, "hada_w1_a.* not of LORA"),
    "IA3 in a LoRA": (CONFIG, {**LORA, f"{PEFT}.ia3_l": draw(8)}, "it has ia3_l, which is not of LORA"),
    "a LoRA in IA3": ({"peft_type": "IA3"}, LORA, "it has lora_A, lora_B, which is not of IA3"),
    "IA3 in LN tuning": ({"peft_type": "LN_TUNING"}, {f"{PEFT}.ia3_l": draw(8)}, "it has ia3_l, which is not of"),
    "norms alone": (CONFIG, {f"{PEFT}.lora_magnitude_vector": draw(8)}, "it has no lora_A"),
    "no module": (CONFIG, {**LORA, "base_model.model.lora_A.weight": A}, "its lora_A are of no module"),
    "norms of LoHa": (
        {**CONFIG, "peft_type": "LOHA", "alpha": 2},
        {f"{PEFT}.{part}": x for part, x in {**HADA, "dora_scale": draw(8, 1)}.items()},
        "it has lora_magnitude_vector, which is not of LOHA",
    ),
}


HOSTILE: Mapping[str, tuple[dict[str, Any], str]] = {
    "no expression": ({"rank_pattern": {"*q_proj": 2}}, r"rank_pattern has '\*q_proj', expected a regular expression"),
    "a list": ({"alpha_pattern": [2]}, r"alpha_pattern has \[2\], expected an object with a number for each"),
    "no number": ({"lora_alpha": float("nan")}, "found nan as its alpha, expected a number"),
    "no finite number": ({"lora_alpha": float("inf")}, "found inf as its alpha, expected a number"),
    "no number of floats": ({"lora_alpha": 10**400}, "as its alpha, expected a number"),
    "groups of outputs": ({"enable_lora": [True, False, True]}, "enable_lora: .* which is not supported here"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused(base: Path, tmp_path: Path, case: str) -> None:
    changes, message = HOSTILE[case]
    adapter = folder_of(write(tmp_path / "adapter/adapter_model.safetensors", LORA), CONFIG | changes)
    with pytest.raises(PlanError, match=message):
        open_model(f"{base}+{adapter}")


@pytest.mark.parametrize("case", STRANGE)
def test_no_tensor_is_without_effect_in_silence(base: Path, tmp_path: Path, case: str) -> None:
    config, tensors, message = STRANGE[case]
    adapter = folder_of(write(tmp_path / "adapter/adapter_model.safetensors", tensors), config)
    with pytest.raises(PlanError, match=message):
        open_model(f"{base}+{adapter}")


def test_a_file_may_mix_kinds(base: Path, tmp_path: Path) -> None:
    """As LyCORIS writes them: one kind for attention, another for the rest. Without alphas the scales are 1."""
    down = "lora_unet_model_layers_0_mlp_down_proj"
    tensors = {f"{down}.lora_down.weight": draw(2, 12), f"{down}.lora_up.weight": B}
    tensors |= {f"lora_unet_{Q.replace('.', '_')}.{part}": x for part, x in HADA.items()}
    changes = {"model.layers.0.mlp.down_proj.weight": B @ draw(2, 12), f"{Q}.weight": (B @ A) ** 2}
    check(base, write(tmp_path / "mixed.safetensors", tensors), changes)


def test_a_models_own_alpha_is_saved(base: Path, tmp_path: Path) -> None:
    """A layer may have a tensor of this name, as of a dynamic tanh, that an adapter saves whole."""
    saved = {f"base_model.model.{NORM}.{end}": draw(size) + 1 for end, size in (("alpha", 1), ("weight", 8))}
    adapter = folder_of(write(tmp_path / "adapter/adapter_model.safetensors", {**LORA, **saved}))
    ones = {f"{NORM}.alpha": torch.ones(1).double(), f"{NORM}.weight": torch.ones(8).double()}
    check(base, adapter, {f"{Q}.weight": 4 * B @ A, **ones})


def kohya(name: str, a: Tensor, b: Tensor, start: str = "lora_unet_", **others: Tensor) -> dict[str, Tensor]:
    """A LoRA of one module as trainers of image models write it."""
    module = start + name.replace(".", "_")
    return {f"{module}.{end}": x for end, x in {"lora_down.weight": a, "lora_up.weight": b, **others}.items()}


def test_text_encoders_with_the_same_names_are_refused(base: Path, tmp_path: Path) -> None:
    """Files for SDXL have two; only one of them can be the model."""
    tensors = kohya(Q, A, B, "lora_te1_") | kohya(Q, A, B, "lora_te2_")
    with pytest.raises(PlanError, match=r"it changes one tensor by two names: lora_te1_\S+ and lora_te2_\S+;"):
        open_model(f"{base}+{write(tmp_path / 'sdxl.safetensors', tensors)}")


@pytest.mark.parametrize("alpha", [torch.tensor(8), torch.tensor(8.0), torch.tensor([8.0])])
def test_alpha_is_a_number_of_any_kind(base: Path, tmp_path: Path, alpha: Tensor) -> None:
    """An integer, as `diffusers` writes it for other trainers, or a float."""
    check(base, write(tmp_path / "lora.safetensors", kohya(Q, A, B, alpha=alpha)), {f"{Q}.weight": 4 * B @ A})


def test_an_alpha_that_is_no_number_is_refused(base: Path, tmp_path: Path) -> None:
    for alpha in (torch.tensor(float("nan")), torch.ones(2), torch.ones(0)):
        file = write(tmp_path / "lora.safetensors", kohya(Q, A, B, alpha=alpha))
        with pytest.raises(PlanError, match=r"found \S+ as its alpha, expected a number|its alpha is \[\d\]"):
            open_model(f"{base}+{file}")


@pytest.mark.parametrize(
    ("name", "w", "halves", "axes"),
    [
        (Q, draw(8, 8).T, (A, B), (1,)),
        (Q, draw(8, 8).T, (A, B), (0,)),
        ("model.layers.0.mlp.down_proj", draw(8, 12), (draw(2, 12), B), (0,)),
        ("model.conv", draw(4, 3, 2, 2), (draw(2, 3, 2, 2), draw(4, 2, 1, 1)), (1, 2, 3)),
        ("model.conv", draw(4, 3, 2, 2), (draw(2, 3, 2, 2), draw(4, 2, 1, 1)), (0, 2, 3)),
    ],
)
def test_norms_are_of_outputs_or_of_inputs(
    base: Path, tmp_path: Path, name: str, w: Tensor, halves: tuple[Tensor, Tensor], axes: tuple[int, ...]
) -> None:
    """DoRA as LyCORIS writes it, over all axes but one: m (W + B A) / |W + B A|. Square layers show only its shape."""
    a, b = halves
    after = w + (b.flatten(1) @ a.flatten(1)).view(w.shape)
    norms = after.square().sum(axes, keepdim=True).sqrt()
    wanted = draw(*norms.shape)
    file = write(tmp_path / "dora.safetensors", kohya(name, a, b, dora_scale=wanted))
    check(base, file, {f"{name}.weight": after * wanted / norms - w})


def test_diffusers_has_the_config_in_the_header(base: Path, tmp_path: Path) -> None:
    """The alpha is there alone: its tensors have PEFT's names. Without it alpha is the rank, as diffusers takes it."""
    tensors = {f"transformer.{name.removeprefix('base_model.model.')}": x for name, x in LORA.items()}
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "alpha_pattern": {}, "peft_type": "LORA"}
    one, two = (
        {f"{model}.{key}": value for key, value in own.items()}
        for model, own in (("transformer", config), ("text_encoder", config | {"lora_alpha": 2}))
    )
    file = write(tmp_path / "pytorch_lora_weights.safetensors", tensors, lora_adapter_metadata=json.dumps(one))
    check(base, file, {f"{Q}.weight": 4 * B @ A})
    check(base, write(file, tensors), {f"{Q}.weight": B @ A})
    for text, message in (
        (json.dumps(one | two), "has adapters of transformer, text_encoder, with other ranks or alphas"),
        ("[]", "lora_adapter_metadata is '\\[\\]', expected an object"),
        (json.dumps(one | {"transformer.r": 4}), "its tensors have rank 2"),
        (json.dumps(one | {"transformer.rank_pattern": {"*": 1}}), "lora_adapter_metadata: rank_pattern has"),
    ):
        with pytest.raises(PlanError, match=message):
            open_model(f"{base}+{write(file, tensors, lora_adapter_metadata=text)}")


FORMS = {
    "processors": {"processor.to_q_lora": ("down", "up"), "processor.to_out_lora": ("down", "up")},
    "layers beside": {"to_q.lora_linear_layer": ("down", "up"), "to_out.0.lora_linear_layer": ("down", "up")},
    "halves": {"to_q.lora": ("down", "up"), "to_out.0.lora": ("down", "up")},
    "peft": {"to_q": ("lora_A", "lora_B"), "to_out.0": ("lora_A", "lora_B")},
}


@pytest.mark.parametrize("beginning", ["unet.", ""])
@pytest.mark.parametrize("form", FORMS)
def test_diffusers_of_all_ages_is_read(base: Path, tmp_path: Path, form: str, beginning: str) -> None:
    tensors = {
        f"{beginning}down_blocks.0.attentions.0.attn1.{module}.{end}.weight": x
        for module, ends in FORMS[form].items()
        for end, x in zip(ends, (A, B), strict=True)
    }
    changes = {f"{name}.weight": B @ A for name in ATTENTION}
    check(base, write(tmp_path / "unet.safetensors", tensors), changes)


def test_a_module_may_be_called_as_a_part_of_an_adapter(base: Path, tmp_path: Path) -> None:
    tensors = {f"base_model.model.x.lora_A.lora_{half}.weight": x for half, x in (("A", A), ("B", B))}
    adapter = folder_of(write(tmp_path / "adapter/adapter_model.safetensors", tensors))
    check(base, adapter, {"x.lora_A.weight": 4 * B @ A})


def test_names_that_are_alike_without_dots_are_refused(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", kohya("y.a_b", A, B))
    with pytest.raises(PlanError, match=r"underscores for dots, .* y\.a_b\.weight or y_a\.b\.weight"):
        open_model(f"{base}+{file}")


def test_tensors_that_the_model_lacks_are_named(base: Path, tmp_path: Path) -> None:
    """A file with the adapters of a U-Net and of its text encoder, and the U-Net as the model."""
    names = [*(f"unet.{name}" for name in ATTENTION), "text_encoder.text_model.encoder.layers.0.q_proj"]
    tensors = {f"{name}.lora_{half}.weight": x for name in names for half, x in (("A", A), ("B", B))}
    with pytest.raises(PlanError, match=r"it changes text_encoder\.\S+, which the model does not have"):
        open_model(f"{base}+{write(tmp_path / 'both.safetensors', tensors)}")


def test_the_largest_share_of_the_largest_alpha_is_a_number(base: Path, tmp_path: Path) -> None:
    """Of float32, too, in which most models are computed."""
    tensors = {name: x.float() * 1e-18 for name, x in LORA.items()}
    config = CONFIG | {"lora_alpha": 9e18}
    adapter = folder_of(write(tmp_path / "adapter/adapter_model.safetensors", tensors), config)
    save_file({f"{Q}.weight": draw(8, 8).float()}, base / "model.safetensors")
    assert bool(open_model(f"{base}+-1e19*{adapter}").read(f"{Q}.weight").isfinite().all())
