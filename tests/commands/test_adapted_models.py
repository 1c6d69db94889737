"""Every command that takes a model takes one with an adapter, and does what it does with the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, run
from helpers_text import byte_tokenizer, llama_config, save_model, write_lines
from models import files_of
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge, open_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a LoRA of its queries, both merged, and texts."""
    folder = tmp_path_factory.mktemp("adapted")
    base = save_model(folder / "base", "LlamaForCausalLM", llama_config(), byte_tokenizer())
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in open_checkpoint(base).items():
        if name.endswith("q_proj.weight"):
            key, (out, columns) = f"base_model.model.{name.removesuffix('.weight')}", spec.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=draw) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=draw) * 0.3
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    model = {"model": str(base), "adapter": str(folder / "lora"), "scale": 0.5}
    merge({"merge_method": "passthrough", "models": [model]}, folder / "merged")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    write_lines(folder / "data.jsonl", *({"text": "the quick brown fox"} for _ in range(8)))
    return folder


def without_names(data: Any) -> Any:
    """An answer in JSON without the names of models and files, and times."""
    if isinstance(data, dict):
        return {
            k: without_names(v)
            for k, v in data.items()
            if not isinstance(v, str) and k not in ("seconds", "peak_memory", "files")
        }
    return [without_names(each) for each in data] if isinstance(data, list) else data


@pytest.mark.parametrize(
    "words",
    [
        "inspect MODEL --content --json",
        "eval MODEL --text PLACE/text.txt --json",
        "barrier PLACE/base MODEL --text PLACE/text.txt --points 3 --json",
        "stats gram MODEL --task lm --data PLACE/data.jsonl -o PLACE/WHICH-gram.safetensors --json",
        "align MODEL --to PLACE/base -o PLACE/WHICH-aligned.safetensors --json",
    ],
)
def test_a_command_takes_a_model_with_an_adapter(place: Path, words: str) -> None:
    answers = []
    for which, model in (("merged", f"{place}/merged"), ("adapted", f"{place}/base+0.5*{place}/lora")):
        result = run(
            *(w.replace("PLACE", str(place)).replace("WHICH", which) for w in words.replace("MODEL", model).split())
        )
        answers.append(answer(result))
    assert without_names(answers[0]) == without_names(answers[1])
    for file in place.glob("merged-*"):
        other = load_file(place / file.name.replace("merged", "adapted"))
        assert all(torch.equal(x, other.pop(name)) for name, x in load_file(file).items()) and not other


@pytest.mark.parametrize("file", ["lora/adapter_model.safetensors", "lora/new.safetensors"])
@pytest.mark.parametrize(
    "words",
    [
        "stats gram MODEL --task lm --data PLACE/data.jsonl -o FILE",
        "align MODEL --to PLACE/base -o FILE --overwrite",
        "align PLACE/base --to MODEL -o FILE --overwrite",
        "init MODEL -o FILE",
    ],
)
def test_no_command_writes_into_an_adapter(place: Path, words: str, file: str) -> None:
    """It is an input, which is only read, as the model is."""
    before = files_of(place / "lora")
    words = words.replace("MODEL", f"{place}/base+{place}/lora").replace("FILE", f"{place}/{file}")
    result = run(*words.replace("PLACE", str(place)).split())
    assert result.exit_code == 2 and ("only read" in result.output or "exists" in result.output)
    assert files_of(place / "lora") == before
