"""Compare merging an adapter into its model with copying the model, and with PEFT.

    python benchmarks/adapters.py                            # 1.1 billion parameters, and a sparse base of 8 GB
    python benchmarks/adapters.py --size 0.01 --sparse 0.05GB  # a smoke test

The model is a Llama's (bf16, two shards), the adapter a LoRA of rank 16 (float32). `ours` is `merge` of MODEL+ADAPTER;
`peft` loads the model in bf16 on the processor, applies the adapter, `merge_and_unload`, and saves it: the same work
and the same form of output. `copy` is the floor: it reads the model and the adapter and writes as many bytes, with an
fsync. The sparse base is a file of 8 GB without data, so that its size costs no disk; a fifth of its bytes are in the
layers that the adapter changes. Every run is a process of its own, after one that fills the page cache; seconds are
medians, and memory is the most that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge_vs_copy import Cost, config, copy, heading, read, run, shapes, write_shard

from mergekit_lfm.machine.sizes import format_size, parse_size
from mergekit_lfm.store.tensors import TensorSpec, encode_header

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def make_model(folder: Path, size: float) -> None:
    """Write a Llama of `size` times 1.1 billion parameters, and an adapter to every matrix of its layers."""
    base = folder / "base"
    base.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for s, shard in enumerate(shapes(size)):
        name = f"model-{s + 1:05d}-of-00002.safetensors"
        write_shard(base / name, [TensorSpec(n, shape, "bfloat16") for n, shape in shard.items()], None, 0)
        weight_map |= dict.fromkeys(shard, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    vocabulary = next(iter(shapes(size)[0].values()))[0]
    settings = {**config(size), "vocab_size": vocabulary, "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(settings))
    matrices = {name: shape for shard in shapes(size) for name, shape in shard.items()}
    write_adapter(folder / "adapter", {n: s for n, s in matrices.items() if n.split(".")[-2] in TARGETS})


def make_sparse(folder: Path, nbytes: int) -> None:
    """Write a base without data of so many bytes, and an adapter to a fifth of them."""
    (folder / "base").mkdir(parents=True)
    rows = max(1, nbytes // (2 * 50 * 4096))
    specs = [
        TensorSpec(f"model.layers.{i}.mlp.{name}_proj.weight", (rows, 4096), "bfloat16")
        for i in range(10)
        for name in ("up", "a", "b", "c", "d")
    ]
    header, _ = encode_header(specs, {"format": "pt"})
    with (folder / "base" / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "none"}))
    write_adapter(folder / "adapter", {spec.name: spec.shape for spec in specs if ".up_proj." in spec.name})


def write_adapter(folder: Path, matrices: Mapping[str, tuple[int, ...]]) -> None:
    """Write a LoRA of these matrices."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, columns) in matrices.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * 0.02
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=draw) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in matrices})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def copy_all(folder: Path, threads: int) -> Cost:
    """Read the model and the adapter, and write a copy of the model."""
    weights = sorted((folder / "base").glob("*.safetensors"))
    (folder / "out").mkdir()
    started, before = time.monotonic(), os.times()
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(read, folder / "adapter" / "adapter_model.safetensors")]
        jobs += [pool.submit(copy, path, folder / "out" / path.name) for path in weights]
        for job in jobs:
            job.result()
    after = os.times()
    return Cost(time.monotonic() - started, after.user + after.system - before.user - before.system, 0)


def measure(folder: Path, way: str, repeats: int, threads: int, memory: int | None) -> list[Cost]:
    """The runs of one way to do the work, each without an earlier output, and with its inputs in the page cache."""
    text = "models: [{model: base, adapter: adapter}]\nmerge_method: passthrough\n"
    (folder / "recipe.yaml").write_text(text)
    ours = [sys.executable, "-m", "mergekit_lfm", "merge", "recipe.yaml", "out", "--quiet", "--threads", str(threads)]
    ours += ["--memory", str(memory)] if memory else []
    runs = []
    for _ in range(repeats):
        shutil.rmtree(folder / "out", ignore_errors=True)
        for path in folder.glob("*/*.safetensors"):
            read(path)
        os.sync()
        if way == "copy":
            runs.append(copy_all(folder, threads))
        else:
            command = ours if way == "ours" else [sys.executable, "-c", PEFT, "base", "adapter", "out"]
            runs.append(run(command, folder, {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}))
    shutil.rmtree(folder / "out", ignore_errors=True)
    return runs


def row(name: str, runs: Sequence[Cost], floor: float) -> str:
    """A line of the table."""
    seconds = statistics.median(run.seconds for run in runs)
    cpu = statistics.median(run.cpu_s for run in runs)
    peak = max(run.peak for run in runs)
    return f"| {name} | {seconds:.2f} | {seconds / floor:.2f} | {cpu:.1f} | {format_size(peak) if peak else ''} |"


def main() -> None:
    """Measure, and print a Markdown table for each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="part of 1.1 billion parameters [default: 1]")
    parser.add_argument("--sparse", type=parse_size, default=8_000_000_000, help="bytes of the sparse base [8GB]")
    parser.add_argument("--memory", type=parse_size, default=500_000_000, help="for the sparse base [500MB]")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    parser.add_argument("--repeats", type=int, default=3, help="[default: 3]")
    parser.add_argument("--dir", type=Path, help="where to make the models [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapters_", dir=args.dir) as temporary:
        model, sparse = Path(temporary) / "model", Path(temporary) / "sparse"
        make = "import adapters, pathlib; adapters.make_model(pathlib.Path({!r}), {})"
        subprocess.run(  # a child's peak memory includes its parent's before the fork
            [sys.executable, "-c", make.format(str(model), args.size)], cwd=Path(__file__).parent, check=True
        )
        make = "import adapters, pathlib; adapters.make_sparse(pathlib.Path({!r}), {})"
        subprocess.run(
            [sys.executable, "-c", make.format(str(sparse), args.sparse)], cwd=Path(__file__).parent, check=True
        )
        print(heading(model, args.threads, args.repeats, []), end="\n\n")
        for title, folder, ways, memory in (
            ("The model, 1.1 billion parameters times the size", model, ("copy", "ours", "peft"), None),
            (f"The sparse base, with --memory {format_size(args.memory)}", sparse, ("copy", "ours"), args.memory),
        ):
            print(f"| {title} | s | of the copy | CPU s | peak memory |\n|---|--:|--:|--:|--:|")
            measured = {way: measure(folder, way, args.repeats, args.threads, memory) for way in ways}
            floor = statistics.median(run.seconds for run in measured["copy"])
            for way, runs in measured.items():
                print(row(way, runs, floor), flush=True)
            print()


if __name__ == "__main__":
    main()
