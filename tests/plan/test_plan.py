"""The tensors that a plan merges, copies, drops and refuses, and the engine's work on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_checkpoint
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.engine.blocks import add_in_order
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.kernels.reductions import Gram
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan import plan as plans
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    return save_checkpoint(folder, tensors, {"dtype": "float32", **config})


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1.0},
        **more,
    }


def language_model(seed: int, head: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = (EMBEDDING, HEAD) if head else (EMBEDDING,)
    return {name: torch.randn(6, 4, generator=generator) for name in names}


def test_a_tied_model_lends_its_embedding_as_head(tmp_path: Path) -> None:
    untied = save(tmp_path / "untied", language_model(0, True), tie_word_embeddings=False)
    tied = save(tmp_path / "tied", language_model(1, False), tie_word_embeddings=True)
    merged = load_file(Path(merge(linear(untied, tied), tmp_path / "out")) / "model.safetensors")
    one, two = language_model(0, True), language_model(1, False)
    assert torch.equal(merged[HEAD], one[HEAD] * 0.5 + two[EMBEDDING] * 0.5)


def test_a_head_that_loaders_would_not_use_is_refused(tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", language_model(0, True), tie_word_embeddings=True)
    untied = save(tmp_path / "untied", language_model(1, True), tie_word_embeddings=False)
    with pytest.raises(PlanError, match="ties it to the embedding"):
        make_plan(Recipe.parse(linear(tied, untied)))


def test_a_redundant_head_is_dropped_by_name(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", language_model(0, False), tie_word_embeddings=True)
    stored = save(tmp_path / "stored", language_model(1, True), tie_word_embeddings=True)
    plan = make_plan(Recipe.parse(linear(plain, stored)))
    assert [(tensor, reason) for _, tensor, reason in plan.dropped] == [
        (HEAD, "tied to the embedding by the model's config")
    ]


def test_buffers_that_are_not_parameters_are_not_merged(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    models = [
        save(tmp_path / f"m{i}", {"w": torch.ones(2), name: torch.arange(3.0) + i * same})
        for i, same in ((0, 1.0), (1, 1.0))
    ]
    recipe = linear(*models, parameters={"weight": 1.0, "normalize": False})
    merged = load_file(Path(merge(recipe, tmp_path / "out")) / "model.safetensors")
    assert merged["w"].tolist() == [2.0, 2.0] and merged[name].tolist() == [0.0, 1.0, 2.0]
    assert [tensor for _, tensor, _ in make_plan(Recipe.parse(recipe)).dropped] == [name]


@pytest.mark.parametrize("first", ["with", "without"])
def test_an_integer_buffer_that_one_model_lacks(tmp_path: Path, first: str) -> None:
    """transformers 5 saves no position_ids, which checkpoints of earlier releases have."""
    name = "embeddings.position_ids"
    have = save(tmp_path / "with", {"w": torch.ones(2), name: torch.arange(4)})
    lack = save(tmp_path / "without", {"w": torch.zeros(2)})
    order = (have, lack) if first == "with" else (lack, have)
    merged = load_file(Path(merge(linear(*order), tmp_path / "out")) / "model.safetensors")
    assert merged["w"].tolist() == [0.5, 0.5]
    assert (name in merged) == (first == "with")


def test_files_beside_the_weights_are_copied_or_named(tmp_path: Path) -> None:
    wanted = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ]
    wanted += ["merges.txt", "tokenizer.model", "chat_template.jinja", "modeling_own.py", "preprocessor_config.json"]
    wanted += ["train.jsonl", "notes.txt", "results.json"]
    state = ["optimizer.pt", "trainer_state.json"]
    model = save(tmp_path / "m", {"w": torch.ones(2)})
    for name in (*wanted, *state, "model.onnx"):
        (model / name).write_text("{}")
    (model / "wandb").mkdir()
    (model / "wandb" / "config.json").write_text("{}")
    with pytest.warns(Finding) as warned:
        out = Path(merge(linear(model), tmp_path / "out"))
    assert {path.name for path in out.iterdir()} == {
        *wanted, "config.json", "model.safetensors", "README.md", "merge.lock.json", "mergekit_config.yml"
    }  # fmt: skip
    assert sorted(str(warning.message).removeprefix(f"{model}: ") for warning in warned) == [
        "model.onnx was left behind: other weights",
        "optimizer.pt, trainer_state.json, wandb/config.json were left behind: the state of a training",
    ]


def test_a_damaged_output_is_not_taken_for_done(tmp_path: Path) -> None:
    recipe = linear(save(tmp_path / "m", {"w": torch.ones(2)}))
    out = Path(merge(recipe, tmp_path / "out"))
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(out / "model.safetensors")
        with pytest.raises(PlanError, match=r"is the output of this merge, but model.safetensors (is missing|has)"):
            merge(recipe, out)
        merge(recipe, out, overwrite=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    (out / "model.safetensors").write_bytes(bytes(len(whole["model.safetensors"])))
    merge(recipe, out, overwrite=True, resume=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_an_output_with_nan_does_not_satisfy_the_default(tmp_path: Path) -> None:
    recipe = linear(save(tmp_path / "m", {"w": torch.tensor([1.0, torch.nan])}))
    with pytest.warns(Finding, match="w of m holds NaN or infinity"):
        out = Path(merge(recipe, tmp_path / "out", nan="warn"))
    merge(recipe, out, nan="warn")
    with pytest.raises(PlanError, match="made with --nan warn"):
        merge(recipe, out)


def test_an_input_where_the_work_would_be_is_safe(tmp_path: Path) -> None:
    model = save(tmp_path / "x.partial", {"w": torch.ones(2)})
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(PlanError, match="lie in one another"):
        merge(linear(model), tmp_path / "x")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_parts_are_added_in_order_and_as_soon_as_they_can_be() -> None:
    added: list[float] = []

    class Noted(Gram):
        def add(self, total: Any, part: Any) -> Any:
            added.append(part)
            return total + part

    def parts() -> Any:
        for index in (2, 0, 1, 4, 3):
            yield index, [0.5, None, 4.0, 8.0, 16.0][index]
            if index == 1:
                assert added == [4.0]

    assert add_in_order(Noted(), parts()) == 28.5
    assert added == [4.0, 8.0, 16.0]


def test_quantised_models_are_copied_but_not_scaled(tmp_path: Path) -> None:
    model = save(tmp_path / "m", {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    copied = load_file(Path(merge(recipe, tmp_path / "out")) / "model.safetensors")
    assert copied["w"].dtype == torch.float8_e4m3fn
    with pytest.raises(PlanError, match="cannot be scaled"):
        make_plan(Recipe.parse(recipe | {"parameters": {"scale": 2.0}}))


def test_a_file_that_must_be_held_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "strided.bin")
    torch.save({"w": torch.arange(6.0).reshape(3, 2)}, tmp_path / "plain.bin")
    recipe = linear(tmp_path / "strided.bin", tmp_path / "plain.bin")
    assert [file.name for file in make_plan(Recipe.parse(recipe)).mapped_files] == ["strided.bin"]
    merged = load_file(Path(merge(recipe, tmp_path / "out")) / "strided.safetensors")
    expected = (torch.arange(6.0).reshape(2, 3).T + torch.arange(6.0).reshape(3, 2)) / 2
    assert torch.equal(merged["w"], expected)


def test_nothing_of_this_machine_is_in_the_lock(tmp_path: Path) -> None:
    models = [
        save(tmp_path / name, {"w": torch.tensor([1.0, value])}) for name, value in (("a", 2.0), ("b", torch.inf))
    ]
    with pytest.warns(Finding, match="w of b holds NaN or infinity"):
        out = Path(merge(linear(*models), tmp_path / "out", nan="warn"))
    for name in ("merge.lock.json", "README.md"):
        assert str(tmp_path) not in (out / name).read_text()
    assert json.loads((out / "merge.lock.json").read_text())["nonfinite"] == ["w of b"]


@pytest.mark.parametrize("columns", [False, True])
def test_memory_for_sums_by_row_and_column_is_planned(tmp_path: Path, columns: bool) -> None:
    """Gram matrices of two million rows of two, or of as many columns, take more than the matrix itself."""
    shape = (2, 2_000_000) if columns else (2_000_000, 2)
    models = [save(tmp_path / name, {"w": torch.zeros(shape).bfloat16()}) for name in ("a", "b")]
    recipe = {
        "merge_method": "nuslerp",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": columns},
    }
    budget = Budget(make_plan(Recipe.parse(recipe)))
    if columns:  # the sums over all rows are needed at once
        assert budget.least(budget.plan.tensors[0]) > 2_000_000 * 4 * 8 * 3
        with pytest.raises(PlanError, match="raise --memory"):
            budget.peak(300_000_000, 1)
        assert budget.peak(600_000_000, 1) <= 600_000_000
    else:
        assert budget.least(budget.plan.tensors[0]) < 1_000_000
        assert budget.peak(20_000_000, 1) <= 20_000_000


def test_an_adapter_named_directly_is_refused(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="is an adapter"):
        make_plan(Recipe.parse(linear(tmp_path / "adapter_model.safetensors")))


def test_the_digest_knows_the_version_of_its_method_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.parse(linear(save(tmp_path / "a", {"w": torch.ones(2)})))
    before = make_plan(recipe).digest
    for name, same in (("linear", False), ("ties", True)):
        newer = replace(METHODS[name], version=METHODS[name].version + 1)
        monkeypatch.setattr(plans, "METHODS", {**METHODS, name: newer})
        assert (make_plan(recipe).digest == before) == same
