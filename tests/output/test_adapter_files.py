"""An adapter that is written is one that peft loads: every key at its place, and the change as it was meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_adapters import Net, logits, tiny_model, with_adapter
from models import files_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_lfm.artifacts.adapter import open_adapter
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.adapter import AdapterOutput, NewAdapter, new_adapter
from mergekit_lfm.output.request import Request
from mergekit_lfm.output.save import check_out

REQUEST = Request({"job": "test"}, {"job": "test"}, ())


def draw_change(model: Any, adapter: NewAdapter, skip: tuple[str, ...] = ()) -> None:
    """Change all layers of a model and their biases, at ranks that differ, and give the adapter the same changes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for i, (name, layer) in enumerate(model.named_modules()):
            turned = isinstance(layer, Conv1D)
            if not (turned or isinstance(layer, nn.Linear)) or name.endswith(skip):
                continue
            weight = layer.weight.T if turned else layer.weight
            a, b = torch.randn(1 + i % 3, weight.shape[1]), torch.randn(weight.shape[0], 1 + i % 3)
            weight.add_(b @ a)
            adapter.add(name, a, b)
            if layer.bias is not None and i % 2:
                layer.bias.add_(1)
                adapter.save(f"{name}.bias", layer.bias.clone())


def output_of(model: Any, **options: Any) -> AdapterOutput:
    return AdapterOutput(names=[*model.state_dict()], architecture=type(model).__name__, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_low_rank_changes_and_biases(tmp_path: Path, kind: str) -> None:
    model, changed = tiny_model(kind), tiny_model(kind)
    with new_adapter(tmp_path / "out", output_of(model, fan_in_fan_out=kind == "gpt2"), REQUEST) as adapter:
        draw_change(changed, adapter, skip=("lm_head",))
    assert not torch.allclose(logits(model), logits(changed), atol=0.1)
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(changed), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["bias"] == "all"
    assert "q_proj" in config["target_modules"] or "c_attn" in config["target_modules"]


def test_a_head_is_saved_whole(tmp_path: Path) -> None:
    model, changed = tiny_model("bert"), tiny_model("bert")
    with new_adapter(tmp_path / "out", output_of(model), REQUEST) as adapter:
        draw_change(changed, adapter, skip=("classifier", "dense"))
        for name in ("classifier", "bert.embeddings.LayerNorm", "bert.pooler.dense"):
            for end, x in changed.get_submodule(name).named_parameters():
                x.data += torch.randn(x.shape)
                adapter.save(f"{name}.{end}", x)
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(changed))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]


def test_without_its_head_a_classifier_has_no_task(tmp_path: Path) -> None:
    """PEFT would look for the head in the adapter."""
    model, changed = tiny_model("bert"), tiny_model("bert")
    with new_adapter(tmp_path / "out", output_of(model), REQUEST) as adapter:
        draw_change(changed, adapter, skip=("classifier",))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] is None
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(changed), atol=1e-4, rtol=1e-4)


def test_embeddings_of_low_rank(tmp_path: Path) -> None:
    model, changed = tiny_model("llama"), tiny_model("llama")
    embedding = changed.get_input_embeddings().weight
    a, b = torch.randn(2, embedding.shape[0]), torch.randn(embedding.shape[1], 2)
    with torch.no_grad():
        embedding += (b @ a).T
    with new_adapter(tmp_path / "out", output_of(model), REQUEST) as adapter:
        adapter.add("model.embed_tokens", a, b, embedding=True)
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(changed))


@pytest.mark.parametrize("parts", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
def test_experts(tmp_path: Path, parts: tuple[str, ...]) -> None:
    model, changed = tiny_model("mixtral"), tiny_model("mixtral")
    with new_adapter(tmp_path / "out", output_of(model), REQUEST) as adapter:
        for i, layer in enumerate(changed.model.layers):
            for rank, part in enumerate(parts, 1):
                x = getattr(layer.mlp.experts, part)
                a, b = torch.randn(4, rank, x.shape[2]), torch.randn(4, x.shape[1], rank)
                x.data += b @ a
                adapter.add_experts(f"model.layers.{i}.mlp.experts.{part}", a, b)
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(changed), atol=1e-4, rtol=1e-4)


def test_names_that_end_alike(tmp_path: Path) -> None:
    """`proj` alone would select both, and so would its full name."""
    model, changed = Net(), Net()
    conv, proj = changed.conv.weight, changed.proj.weight
    a, b = torch.randn(2, 3, 3, 3), torch.randn(6, 2, 1, 1)
    c, d = torch.randn(1, 6), torch.randn(6, 1)
    with torch.no_grad():
        conv += (b.flatten(1) @ a.flatten(1)).view(conv.shape)
        proj += d @ c
    with new_adapter(tmp_path / "out", AdapterOutput(names=[*model.state_dict()]), REQUEST) as adapter:
        adapter.add("conv", a, b)
        adapter.add("proj", c, d)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(with_adapter(model, tmp_path / "out")(images), changed(images))


FEW = AdapterOutput(names=["norm.weight", "layers.0.norm1.weight", "layers.0.pre_norm.weight", "layers.0.q.weight"])


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (["norm.weight"], r"cannot save norm without layers\.0\.pre_norm, whose names end alike; exclude them"),
        (["cls"], "cls without the other tensors of the model; exclude it"),
        (["layers.0.norm1.scale"], r"norm1\.scale without the other tensors of layers\.0\.norm1"),
    ],
)
def test_a_saved_tensor_that_peft_cannot_save_is_refused(tmp_path: Path, saved: list[str], message: str) -> None:
    output = replace(FEW, names={*(FEW.names or ()), *saved, "layers.0.norm1.shift"})
    with pytest.raises(PlanError, match=message), new_adapter(tmp_path / "out", output, REQUEST) as adapter:
        for name in saved:
            adapter.save(name, torch.ones(6))
    assert not list(tmp_path.iterdir())


def fill(adapter: NewAdapter, ranks: list[int]) -> None:
    for i, rank in enumerate(ranks):
        adapter.add(f"layers.{i}.q", torch.full((rank, 4), float(i)), torch.ones(3, rank))


def write(out: Path, ranks: list[int], *, turned: bool = False) -> None:
    names = [f"layers.{i}.q.weight" for i in range(12)]
    with new_adapter(out, AdapterOutput(names=names, base="a", about="By hand."), REQUEST) as adapter:
        if turned:
            for i in reversed(range(len(ranks))):
                adapter.add(f"layers.{i}.q", torch.full((ranks[i], 4), float(i)), torch.ones(3, ranks[i]))
        else:
            fill(adapter, ranks)


def test_the_order_in_which_factors_come_leaves_no_trace(tmp_path: Path) -> None:
    ranks = [2, 3, 2, 1, 2, 2, 2, 2, 2, 2, 2, 3]
    for folder, turned in (("x", False), ("y", True)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "out", ranks, turned=turned)
    assert files_of(tmp_path / "x") == files_of(tmp_path / "y")
    config = json.loads((tmp_path / "x" / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["q"])
    expected = {"layers.1.q": 3, "layers.3.q": 1, "layers.11.q": 3}
    assert config["rank_pattern"] == config["alpha_pattern"] == expected
    for module in open_adapter(tmp_path / "x" / "out").modules:
        assert module.parts["lora_A"].shape[0] == ranks[int(module.name.split(".")[1])]


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", [1])
    with pytest.raises(PlanError, match="out exists"):
        check_out(tmp_path / "out", {}, overwrite=False)
    check_out(tmp_path / "out", {}, overwrite=True)
    write(tmp_path / "out", [2])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(PlanError, match=r"belong to no model saved there: notes\.txt"):
        check_out(tmp_path / "out", {}, overwrite=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "out", [1])
    before = files_of(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_adapter(tmp_path / "out", FEW, REQUEST) as adapter:
        fill(adapter, [2, 2])
        raise KeyboardInterrupt
    assert files_of(tmp_path) == before


def test_the_card_is_one_to_publish(tmp_path: Path) -> None:
    output = replace(
        FEW, repo="org/base", architecture="LlamaForCausalLM", license={"license": "mit"}, about="By *hand*."
    )
    with new_adapter(tmp_path / "out", output, REQUEST) as adapter:
        fill(adapter, [1])
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/base" and front["library_name"] == "peft" and front["license"] == "mit"
    assert "By *hand*." in card and "LlamaForCausalLM.from_pretrained('org/base')" in card
