"""Sizes that matter: a tensor many times the memory budget, and the headers of a 70-billion-parameter model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_views import fp8_config, fp8_tensors, make_patch
from safetensors.torch import save_file

from mergekit_lfm import merge
from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header
from mergekit_lfm.views.quantisation import dequantise
from mergekit_lfm.views.renamed import Renamed

NORMS = ("input", "post_attention")
NUMEL = 600_000_000  # in bfloat16, 1.2 GB
# Runs a command and prints its own peak memory in KB; wait4 would count its parent's, from before the exec.
MEASURED = """
from pathlib import Path
from mergekit_lfm.commands.app import main
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def write_large(folder: Path, seed: int) -> None:
    """A checkpoint whose only tensor has 1.2 GB, written piece by piece."""
    folder.mkdir()
    header, _ = encode_header([TensorSpec("w", (NUMEL // 1000, 1000), "bfloat16")], {"format": "pt"})
    generator = torch.Generator().manual_seed(seed)
    piece = torch.randn(NUMEL // 60, generator=generator).bfloat16()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for _ in range(60):
            piece = piece.roll(1)
            file.write(bytes_of(piece))


@pytest.mark.slow
def test_a_tensor_larger_than_the_budget_is_merged_within_it(tmp_path: Path) -> None:
    """--memory 300MB and two checkpoints of one 1.2 GB tensor: at most 900 MB resident in all."""
    write_large(tmp_path / "base", 0)
    write_large(tmp_path / "tuned", 1)
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "tuned", "parameters": {"weight": 1.0, "density": 0.3}}],
    }
    (tmp_path / "ties.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["merge", "ties.yaml", "out", "--memory", "300MB", "--quiet"]
    assert measure_peak(tmp_path, *arguments) <= 900e6


def write_llama(folder: Path, seed: int, hidden: int = 1024, middle: int = 2816, layers: int = 3) -> None:
    """A random Llama of this width, in bfloat16: 30 million numbers and 8,000 tokens."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (8000, hidden), "lm_head.weight": (8000, hidden)}
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 4, hidden),
            "self_attn.v_proj": (hidden // 4, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    tensors = {name: torch.randn(shape, generator=draw).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in NORMS)):
        tensors[f"{name}.weight"] = torch.rand(hidden, generator=draw).add_(0.5).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rotated_model_is_merged_within_the_memory_of_the_plan(tmp_path: Path, threads: int) -> None:
    """The limit is the peak of the same merge without a rotation plus the plan's bytes, for a model in many files."""
    write_llama(tmp_path / "a", 0)
    write_llama(tmp_path / "whole", 1)
    copy = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "whole")}]}
    b = Path(merge(copy, tmp_path / "b", max_shard_size="15MB"))
    held = open_checkpoint(b)
    gains = {name: held.read(name).view(held[name].shape) for name in held if "norm" in name}
    random_transform(gains, find_symmetries(held), seed=0).save(tmp_path / "t.safetensors")
    peaks = {}
    for name, more in {"plain": {}, "rotated": {"align": "t.safetensors"}}.items():
        recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b", **more}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "parameters": {"weight": 1.0}}))
        arguments = ["merge", f"{name}.yaml", name, "--memory", "250MB", "--threads", str(threads), "--quiet"]
        peaks[name] = measure_peak(tmp_path, *arguments)
    plan = make_plan(Recipe.load(tmp_path / "rotated.yaml"))
    promised = Budget(plan).peak(250_000_000, threads)
    assert Budget(plan).resident_views > 1024**2 * 8  # the rotation itself
    assert peaks["rotated"] - peaks["plain"] <= promised


@pytest.mark.slow
def test_views_of_views_are_merged_within_the_memory_of_the_plan(tmp_path: Path) -> None:
    """A model in FP8, under other names and patched: the peak grows as the plan says at most, by less than a tensor."""
    write_llama(tmp_path / "a", 0)
    write_llama(tmp_path / "b", 1)
    stored = open_checkpoint(tmp_path / "b")
    tensors = fp8_tensors({name: stored.read(name).view(spec.shape) for name, spec in stored.items()})
    (tmp_path / "fp8").mkdir()
    renamed = {name.replace("model.", "m."): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(stored.config | fp8_config()))
    plain = dequantise(Renamed(open_checkpoint(tmp_path / "fp8"), [RenameRule("m.", "model.")]))
    make_patch(plain, [name for name in plain if name.endswith(("up_proj.weight", "head.weight"))]).save(
        tmp_path / "p.st"
    )
    lines = {"plain": {"model": "b"}, "views": {"model": "fp8", "rename": {"m.": "model."}, "edits": ["p.st"]}}
    options = ("--memory", "250MB", "--threads", "1", "--quiet")
    peaks = {}
    for name, line in lines.items():
        recipe = {"merge_method": "linear", "models": [{"model": "a"}, line], "parameters": {"weight": 1.0}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "dtype": "bfloat16"}))
        peaks[name] = measure_peak(tmp_path, "merge", f"{name}.yaml", name, *options)
    budget = Budget(make_plan(Recipe.load(tmp_path / "views.yaml")))
    views = max(budget.views(job) for job in budget.plan.tensors) + budget.resident_views
    assert peaks["views"] - peaks["plain"] <= views < plain["lm_head.weight"].nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "count", "recipe", "memory"),
    [
        ((2000, 1000), 40, {"merge_method": "karcher"}, 200_000_000),
        ((1_000_000, 4), 4, {"merge_method": "model_stock", "parameters": {"filter_wise": True}}, 60_000_000),
    ],
)
def test_many_inputs_and_many_rows_are_merged_within_the_budget(
    tmp_path: Path, shape: tuple[int, int], count: int, recipe: dict[str, Any], memory: int
) -> None:
    """The limit is the peak of the same merge of tiny tensors plus the budget."""
    peaks = []
    for name, sizes in {"tiny": (2, 4), "large": shape}.items():
        (tmp_path / name).mkdir()
        draw = torch.Generator().manual_seed(0)
        base = torch.randn(sizes, generator=draw)
        for i in range(count):
            (tmp_path / name / f"m{i}").mkdir()
            tuned = (base + 0.1 * torch.randn(sizes, generator=draw)).bfloat16()
            save_file({"w": tuned}, tmp_path / name / f"m{i}" / "model.safetensors")
        models = {"base_model": "m0", "models": [{"model": f"m{i}"} for i in range(1, count)]}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **models}))
        peaks.append(measure_peak(tmp_path / name, "merge", "recipe.yaml", "out", "--memory", str(memory), "--quiet"))
    assert peaks[1] - peaks[0] <= memory


def measure_peak(folder: Path, *arguments: str) -> int:
    """The most memory in bytes that a command holds, run in the folder."""
    ran = subprocess.run([sys.executable, "-c", MEASURED, *arguments], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split()[-1]) * 1024


def llama_70b() -> dict[str, tuple[int, ...]]:
    hidden, middle, layers, vocab, heads = 8192, 28672, 80, 128256, 1024
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (heads, hidden),
            "self_attn.v_proj": (heads, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_headers(folder: Path) -> None:
    """The files of a 70B model; their data are holes that take no room on the disk."""
    folder.mkdir()
    items = list(llama_70b().items())
    weight_map: dict[str, str] = {}
    for number in range(30):
        part = items[number * len(items) // 30 : (number + 1) * len(items) // 30]
        specs = [TensorSpec(name, shape, "bfloat16") for name, shape in part]
        header, _ = encode_header(specs, {"format": "pt"})
        name = f"model-{number + 1:05d}-of-00030.safetensors"
        (folder / name).write_bytes(header)
        os.truncate(folder / name, len(header) + sum(spec.nbytes for spec in specs))
        weight_map |= {spec.name: name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')


def test_a_70b_model_is_planned_from_its_headers(tmp_path: Path) -> None:
    names = ("base", "a", "b", "c")
    for name in names:
        write_headers(tmp_path / name)
    recipe = Recipe.parse(
        {
            "merge_method": "ties",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / name)} for name in names[1:]],
            "parameters": {"weight": [0.2, 0.8], "density": 0.3},
        }
    )
    plan = make_plan(recipe)
    assert len(plan.tensors) == 723 and plan.bytes_written == 2 * 70_553_706_496
    assert [shard.name for shard in plan.shards] == [f"model-{i:05d}-of-00030.safetensors" for i in range(1, 31)]
    assert Budget(plan).peak(4_000_000_000, 2) <= 4_000_000_000
    middle = next(job for job in plan.tensors if "layers.79." in job.name)
    assert middle.settings.inputs[0]["weight"] == 0.8
