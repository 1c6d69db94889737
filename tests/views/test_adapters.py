"""Adapters of every kind against PEFT: its merge, and the outputs of its running model."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from helpers_commands import ROOT, run
from helpers_peft import KINDS, LORA, MODELS, Made, adapt, logits, make
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.adapted import Adapted, open_model
from mergekit_lfm.views.adapters.kinds import KINDS as ADAPTER_KINDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

DORA = LORA(r=2, use_dora=True, target_modules=["q_proj"])


def merged_by_peft(made: Made, folder: Path) -> Checkpoint:
    """The model after PEFT's own merge, as transformers saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.live.merge_and_unload().save_pretrained(folder)
    return open_checkpoint(folder)


def error(view: Checkpoint, expected: Checkpoint) -> float:
    """The largest difference of a tensor, over the largest number in it."""
    assert {name: spec.shape for name, spec in view.items()} == {name: spec.shape for name, spec in expected.items()}
    pairs = ((view.read(name).double(), expected.read(name).double()) for name in view)
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in pairs)


def loaded(view: Checkpoint) -> PreTrainedModel:
    """The running model of the tensors, as the class that its config names."""
    import transformers

    (name,) = view.config["architectures"]
    config = AutoConfig.from_pretrained(view.path)
    config._experts_implementation = "eager"
    tensors = {name: view.read(name).view(spec.shape) for name, spec in view.items()}
    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())
    model = getattr(transformers, name).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("dtype", "near", "near_outputs"),
    [("float64", 1e-12, 1e-10), pytest.param("float32", 1e-6, 1e-5, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_the_model_of_peft(
    name: str, dtype: str, near: float, near_outputs: float, tmp_path: Path
) -> None:
    """The tensors are those of PEFT's merge, and the outputs those of the model with the adapter beside it."""
    model, config, options, merges = KINDS[name]
    made = make(tmp_path, model, config(**options), getattr(torch, dtype))
    view, base = open_model(made.reference), open_checkpoint(made.base)
    changed = {name for name in view if view.digest_of(name) != base.digest_of(name)}
    assert isinstance(view, Adapted) and changed
    assert changed <= {name for name in view if view.maker(name) is not None or view.source(name) != (0, name)}
    expected = logits(made.live)
    assert float((logits(loaded(view)) - expected).abs().max()) <= near_outputs * float(expected.abs().max())
    if merges:
        assert error(view, merged_by_peft(made, tmp_path / "merged")) <= near


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A model, and the options of a LoRA."""
    model, names = draw(st.sampled_from([("llama", "q_proj v_proj o_proj up_proj down_proj"), ("gpt2", "c_attn c_fc")]))
    targets = draw(st.lists(st.sampled_from(names.split()), min_size=1, unique=True))
    small = st.integers(1, 6)
    options: dict[str, Any] = {"r": draw(small), "lora_alpha": draw(st.integers(1, 20)), "target_modules": targets}
    options["use_rslora"], options["use_dora"] = draw(st.booleans()), draw(st.booleans())
    options["bias"] = draw(st.sampled_from(["none", "all", "lora_only"]))
    options["fan_in_fan_out"] = draw(st.booleans()) if model == "gpt2" else False
    for key in ("rank_pattern", "alpha_pattern"):
        options[key] = draw(st.dictionaries(st.sampled_from(targets), small, max_size=2))
    if model == "llama" and not options["use_dora"] and options["bias"] == "none":
        options["lora_bias"] = draw(st.booleans())
    return model, options


def check_config(model: str, options: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        made = make(Path(folder), model, peft.LoraConfig(**options), torch.float64)
        assert error(open_model(made.reference), merged_by_peft(made, Path(folder) / "merged")) <= 1e-12


@settings(max_examples=6, deadline=None)
@given(configs())
def test_any_lora_gives_the_model_of_peft(case: tuple[str, dict[str, Any]]) -> None:
    check_config(*case)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(configs())
def test_two_hundred_loras_give_the_models_of_peft(case: tuple[str, dict[str, Any]]) -> None:
    check_config(*case)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path]:
    """A Llama in bfloat16 with a LoRA and, beside it, a DoRA."""
    folder = tmp_path_factory.mktemp("pair")
    lora = make(folder, "llama", LORA(r=4, target_modules=["q_proj", "down_proj"]), torch.bfloat16)
    torch.manual_seed(0)
    base: Any = MODELS["llama"]()
    return lora, adapt(base.to(torch.bfloat16), folder, DORA, "dora").adapter


def test_adapters_are_applied_in_turn_and_rounded_once(pair: tuple[Made, Path]) -> None:
    """By the formulas, in float64: W + s B A, then m (V + s D C) over the norms of its rows."""
    made, dora = pair
    view, base = open_model(f"{made.reference}+{dora}"), open_checkpoint(made.base)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (made.adapter, dora))
    name = "model.layers.1.self_attn.q_proj"
    key = f"base_model.model.{name}"
    w = base.read(f"{name}.weight").view(base[f"{name}.weight"].shape).double()
    v = w + 2 * one[f"{key}.lora_B.weight"].double() @ one[f"{key}.lora_A.weight"].double()
    sum_ = v + 4 * two[f"{key}.lora_B.weight"].double() @ two[f"{key}.lora_A.weight"].double()
    expected = sum_ * (two[f"{key}.lora_magnitude_vector"].double() / sum_.norm(dim=1))[:, None]
    got = view.read(f"{name}.weight").view(w.shape)
    assert got.dtype == torch.bfloat16 and view[f"{name}.weight"] == base[f"{name}.weight"]
    exact = got.double() == expected.to(torch.float32).to(torch.bfloat16).double()
    assert exact.float().mean() > 0.99  # the others lie between two numbers of bfloat16, as far as float32 can tell
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=0)


def test_a_share_of_an_adapter_is_that_share_of_its_change(pair: tuple[Made, Path]) -> None:
    made, dora = pair
    base = open_checkpoint(made.base)
    for adapter in (made.adapter, dora):
        none, half, whole, back = (open_model(f"{made.base}+{s}*{adapter}") for s in ("0", ".5", "1.0", "-1"))
        assert all(none.digest_of(name) == base.digest_of(name) for name in base)
        assert whole.digests == open_model(f"{made.base}+{adapter}").digests
        for name in (name for name in base if whole.location(name) is None):
            w, d = base.read(name).double(), whole.read(name).double() - base.read(name).double()
            torch.testing.assert_close(
                half.read(name).double(), w + d / 2, rtol=2**-7, atol=2**-7 * float(d.abs().max())
            )
            near = 2**-6 * float(d.abs().max())
            torch.testing.assert_close(back.read(name).double(), w - d, rtol=2**-7, atol=near)


def test_a_merge_takes_adapters_before_they_are_rounded(pair: tuple[Made, Path], tmp_path: Path) -> None:
    """The mean of base+adapter and its base, in float64, rounded to bfloat16 once; other tensors are copied."""
    made, _ = pair
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(made.base), "parameters": {"weight": 0.5}},
            {"model": str(made.base), "adapter": str(made.adapter), "scale": 0.5, "parameters": {"weight": 0.5}},
        ],
    }
    out, base = open_checkpoint(Path(merge(recipe, tmp_path / "out"))), open_checkpoint(made.base)
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    for name, spec in base.items():
        key, w = f"base_model.model.{name.removesuffix('.weight')}", base.read(name).view(spec.shape)
        assert out[name] == spec
        if f"{key}.lora_A.weight" in tensors:
            delta = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
            w = (w.double() + delta / 2).float().bfloat16()
        assert (out.read(name).view(spec.shape) == w).float().mean() > 0.99, name


def test_a_merge_of_one_model_and_its_adapter_is_that_model(pair: tuple[Made, Path], tmp_path: Path) -> None:
    """`passthrough`, with the layout of its base; nothing of this machine is in its documents."""
    made, dora = pair
    text = f"models:\n  - model: {made.base}\n    adapter: [{made.adapter}, {dora}]\nmerge_method: passthrough\n"
    (tmp_path / "recipe.yaml").write_text(text)
    merged = Path(merge(tmp_path / "recipe.yaml", tmp_path / "out"))
    expected = open_model(f"{made.reference}+{dora}")
    assert open_checkpoint(merged).digests == expected.digests
    lock, card = ((merged / name).read_text() for name in ("merge.lock.json", "README.md"))
    assert str(made.base.parent) not in lock + card and "- base+adapter+dora" in card
    files = [file["file"] for file in json.loads(lock)["inputs"][0]["files"] if "file" in file]
    assert files == ["model.safetensors", "adapter_model.safetensors", "adapter_model.safetensors"]
    loaded(open_checkpoint(merged))


def test_older_names_and_archives_are_read(pair: tuple[Made, Path], tmp_path: Path) -> None:
    """With the adapter's name, as PEFT once wrote them; in a pickle; without PEFT's prefix, or the model's."""
    made, _ = pair
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    expected = open_model(made.reference)
    named, prefix = ("lora_A.weight", "lora_A.default.weight"), "base_model.model."
    for number, (old, new) in enumerate((named, (prefix, ""), (f"{prefix}model.", prefix))):
        other = shutil.copytree(made.adapter, tmp_path / str(number))
        (other / "adapter_model.safetensors").unlink()
        torch.save({name.replace(old, new, 1): x for name, x in tensors.items()}, other / "adapter_model.bin")
        assert open_model(f"{made.base}+{other}").digests == expected.digests


def test_names_of_trainers_of_image_models_are_read(pair: tuple[Made, Path], tmp_path: Path) -> None:
    """One file without a config: dots as underscores, halves called down and up, an alpha for each module."""
    made, _ = pair
    tensors, named = load_file(made.adapter / "adapter_model.safetensors"), {}
    for name, x in tensors.items():
        module, half = name.removeprefix("base_model.model.").split(".lora_")
        key = "lora_unet_" + module.replace(".", "_")
        named[f"{key}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = x
        named[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(named, tmp_path / "kohya.safetensors")
    assert open_model(f"{made.base}+{tmp_path}/kohya.safetensors").digests == open_model(made.reference).digests


def test_a_plan_names_each_adapter_and_a_head_that_changes(tmp_path: Path) -> None:
    """The model stores its embedding alone, and uses it as its head."""
    made = make(tmp_path, "tied", LORA(r=2, target_modules=["embed_tokens", "q_proj"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models: [{{model: {made.base}, adapter: {made.adapter}}}]\nmerge_method: passthrough\n")
    data, text = (run("plan", str(recipe), *words).stdout for words in (["--json"], []))
    (adapter,) = json.loads(data)["adapters"]
    assert (adapter["kind"], adapter["changed"]) == ("LORA", 3)
    assert "LORA, changes 3 of 34 tensors" in text
    assert "the adapter changes model.embed_tokens.weight, to which lm_head.weight is tied" in text


def test_an_adapter_can_be_inspected(pair: tuple[Made, Path]) -> None:
    _, dora = pair
    data, text = (run("inspect", str(dora), *words).stdout for words in (["--json"], []))
    described = json.loads(data)["adapter"]
    assert (described["kind"], described["ranks"]) == ("LORA", [{"rank": 2, "modules": 2}])
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in text and "2 (2 modules)" in text


def test_every_kind_is_a_line_of_the_guide() -> None:
    text = (ROOT / "docs/adapters.md").read_text("utf-8")
    table = text[text.index("| kind | tested on |") :].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == [*KINDS]
    assert {*ADAPTER_KINDS} <= {*re.findall(r"`(\w+)`", text[text.index("## Kinds") :])}


def test_tensors_that_stand_for_the_models_are_copied(tmp_path: Path) -> None:
    """A batch normalisation that was trained whole, with its counter, which is an integer."""
    norm = "resnet.embedder.embedder.normalization"
    config = LORA(r=2, target_modules=["layer.0.convolution"], modules_to_save=[norm])
    made = make(tmp_path, "resnet", config)
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    for reference in (made.reference, f"{made.base}+0.5*{made.adapter}"):
        view = open_model(reference)
        key = f"{norm}.num_batches_tracked"
        assert torch.equal(view.read(key), tensors[f"base_model.model.{key}"].reshape(1))
        assert (view.location(f"{norm}.weight") is not None) == (reference == made.reference)
