"""Adapters that are broken, hostile or of another model: one message about all of it, with a cure."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import run
from helpers_peft import LORA, Made, change_config, change_tensors, make
from models import files_of

from mergekit_lfm import PlanError
from mergekit_lfm.views.adapted import open_model

Tensors = dict[str, torch.Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("broken")
    return make(folder, "llama", LORA(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def with_others(**others: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): x for name, x in others.items()}}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


A, B, NORM = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.model.norm.weight"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank that the tensors do not have": ({"r": 8}, "q_proj: its tensors have rank 4, adapter_config.json says 8"),
    "a pattern for nothing": ({"rank_pattern": {"o_proj": 4}}, "rank_pattern has 'o_proj', which matches none of its"),
    "flags within a pattern": ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern has '.*q_proj', expected a regular"),
    "a list for a rank": (
        {"rank_pattern": {"q_proj": [4]}},
        "rank_pattern has .*, expected an object with a number for",
    ),
    "a number for a parameter": ({"target_parameters": [1]}, r"target_parameters has \[1\], expected a list of names"),
    "an alpha as text": ({"lora_alpha": "big"}, "found 'big' as its alpha, expected a number"),
    "a kind without weights": (
        {"peft_type": "PREFIX_TUNING"},
        "PREFIX_TUNING, a prompt, which changes no weights: it cannot",
    ),
    "a kind that is not known": ({"peft_type": "OFT"}, "is OFT, expected one of LORA, .*merge_and_unload"),
    "no kind": ({"peft_type": None}, "expected an object with peft_type"),
    "a changed base": ({"init_lora_weights": "pissa"}, "was started with 'pissa', which changes the model's weights"),
    "something unknown": ({"use_qalora": True}, "adapter_config.json has use_qalora: True, which is not supported"),
    "DoRA without magnitudes": ({"use_dora": True}, "no lora_magnitude_vector, though use_dora is set"),
}
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "half of a pair": (without(B), r"q_proj: it has no lora_B; save the adapter anew"),
    "the other half": (without(A), r"q_proj: it has no lora_A; save the adapter anew"),
    "other shapes": (
        lambda tensors: {**tensors, A: torch.ones(4, 17)},
        r"lora_A \[4, 17\] and lora_B \[16, 4\] do not fit model\.layers\.0\.self_attn\.q_proj\.weight \[16, 16\]",
    ),
    "matrices of two kinds": (
        with_others(**{f"{Q}.lora_embedding_{half}".replace(".", "__"): torch.zeros(4, 4) for half in "AB"}),
        "q_proj: it has matrices of a layer and of an embedding; save the adapter anew",
    ),
    "other ranks": (lambda tensors: {**tensors, A: torch.ones(5, 16)}, "do not fit"),
    "a part of a training": (lambda tensors: {**tensors, A: torch.ones(0)}, "one part of many; save it gathered"),
    "tensors that the model lacks": (
        renamed("layers.1", "layers.7"),
        r"it changes model\.layers\.7\.\S+, .* does not have",
    ),
    "another model's names": (
        lambda tensors: {name.replace("layers", "blocks"): x for name, x in tensors.items() if "norm" not in name},
        "none of the 4 tensors .* is in",
    ),
    "a saved module of another size": (
        lambda tensors: {**tensors, NORM: torch.ones(17)},
        r"model\.norm\.weight \[16\] float32 is \[17\] in the adapter: give the model it was trained on",
    ),
    "integers": (lambda tensors: {**tensors, A: torch.ones(4, 16, dtype=torch.int8)}, "not floating-point numbers"),
    "integers for numbers": (lambda tensors: {**tensors, NORM: torch.ones(16, dtype=torch.int8)}, "int8"),
    "nothing of an adapter": (lambda _: {"lora_A.weight.lost": torch.ones(1)}, "is in"),
    "a bias that the layer cannot have": (
        lambda tensors: {**tensors, f"{Q}.lora_B.bias": torch.ones(3)},
        r"its lora_B has a bias \[3\], the model has model\.layers\.0\.self_attn\.q_proj\.bias \[16\]",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(made: Made, tmp_path: Path, case: str) -> None:
    changes, message = CONFIGS[case]
    adapter = change_config(shutil.copytree(made.adapter, tmp_path / "adapter"), **changes)
    with pytest.raises(PlanError, match=message):
        open_model(f"{made.base}+{adapter}")


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(made: Made, tmp_path: Path, case: str) -> None:
    change, message = TENSORS[case]
    adapter = change_tensors(shutil.copytree(made.adapter, tmp_path / "adapter"), change)
    with pytest.raises(PlanError, match=message):
        open_model(f"{made.base}+{adapter}")


def test_all_problems_are_in_one_message(made: Made, tmp_path: Path) -> None:
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    change_config(change_tensors(adapter, without(B)), alpha_pattern={"k_proj": 3}, use_qalora=True)
    with pytest.raises(PlanError) as caught:
        open_model(f"{made.base}+{adapter}+{adapter}")
    text = str(caught.value)
    assert all(text.count(part) == 2 for part in ("has no lora_B", "has 'k_proj'", "use_qalora"))


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("/tmp/of-a-hostile-adapter"),)  # type: ignore[return-value]


def test_no_code_of_an_adapter_runs(made: Made, tmp_path: Path) -> None:
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({A: torch.ones(4, 16), "evil": Hostile()}, adapter / "adapter_model.bin", pickle_module=pickle)
    with pytest.raises(PlanError, match=r"adapter_model\.bin: not a checkpoint that can be loaded safely"):
        open_model(f"{made.base}+{adapter}")
    assert not Path("/tmp/of-a-hostile-adapter").exists()


def test_another_folder_in_an_adapters_place_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"holds no adapter: expected adapter_model\.safetensors or adapter_model\.bin"):
        open_model(f"{made.base}+{made.base}")
    bare = shutil.copytree(made.adapter, tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    with pytest.raises(PlanError, match=r"has no adapter_config\.json, which says how"):
        open_model(f"{made.base}+{bare}")
    with pytest.raises(ValueError, match=re.escape(f"there is no {tmp_path}/nowhere")):
        open_model(f"{made.base}+{tmp_path}/nowhere")


def test_an_adapter_in_a_models_place_names_its_model(made: Made, tmp_path: Path) -> None:
    """On the command line, with exit code 2, and nothing is written."""
    adapter = change_config(shutil.copytree(made.adapter, tmp_path / "adapter"), base_model_name_or_path="meta/Llama-9")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {adapter}}}]\n")
    before = files_of(tmp_path)
    result = run("merge", str(recipe), str(tmp_path / "out"))
    assert result.exit_code == 2 and f"name it with its model, meta/Llama-9+{adapter}" in result.output
    assert files_of(tmp_path) == before


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    """The model stores one matrix for both; a merged one would need two."""
    made = make(tmp_path, "tied", LORA(r=2, target_modules=["lm_head"]))
    with pytest.raises(PlanError, match=r"changes lm_head.weight, which the model ties to model.embed_tokens.weight"):
        open_model(made.reference)
