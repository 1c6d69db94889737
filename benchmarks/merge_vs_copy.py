"""Compare the time of merges with that of copying the same bytes.

    python benchmarks/merge_vs_copy.py                       # 1.1 billion parameters: 28 GB of disk, half an hour
    python benchmarks/merge_vs_copy.py --size 0.01           # a smoke test

Makes checkpoints of a Llama's shape (bf16, two shards each): a base, and three models near it; and, for two of these,
statistics files (float32) with the shapes of real ones. Every merge is a process of its own. Its floor, in the same
run, reads the merge's inputs, discards them, and writes as many bytes as the merge's output by plain copy, with the
merge's number of threads and an fsync at the end. `stacked` copies the first half of a model's layers, then all of it.
Before each run its inputs are read into the page cache, the last output is removed, and dirty pages are written back.
Numbers are medians; `ratio` is (merge - start-up) / floor, where start-up is the same merge of one tiny tensor; it
means nothing for small sizes. `cold` is a first run that compiles its kernels and reads the models with statistics once
more for their digests; `eager` is a run that may not compile; the other runs find kernels and digests in the cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.align.elements import ElementKind, random_transform
from mergekit_lfm.arch import Symmetries, find_symmetries
from mergekit_lfm.arch.table import Part
from mergekit_lfm.artifacts.statistics import Layer, StatisticsInfo
from mergekit_lfm.artifacts.transform import Transform, TransformInfo
from mergekit_lfm.machine.resources import default_threads
from mergekit_lfm.machine.sizes import format_size, parse_size
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header

if TYPE_CHECKING:
    from torch import Tensor

MODELS = ("base", "one", "two", "three")
THREE = "models: [{model: one}, {model: two}, {model: three}]\n"
TWO = "models: [{model: one}, {model: two}]\nbase_model: base\n"
LAYERS = """\
parameters: {decompose: [{filter: embed_tokens, value: none}, {filter: lm_head, value: none}, {value: matrices}]}
"""
STACKED = """slices:
- sources: [{{model: one, layer_range: [0, {half}]}}]
- sources: [{{model: one, layer_range: [0, {layers}]}}]
"""
RECIPES = {
    "linear": THREE + "parameters: {weight: 1}\n",
    "slerp": "models: [{model: one}]\nbase_model: base\nparameters: {t: 0.4}\n",
    "ties": THREE + "base_model: base\nparameters: {weight: 1, density: 0.5}\n",
    "dare_linear": THREE + "base_model: base\nparameters: {weight: 0.4, density: 0.5}\n",
    "dare_ties": THREE + "base_model: base\nparameters: {weight: 0.4, density: 0.5}\n",
    "della": THREE + "base_model: base\nparameters: {weight: 0.4, density: 0.5}\n",
    "sce": THREE + "base_model: base\nparameters: {select_topk: 0.1}\n",
    "karcher": THREE,
    "fisher": "models: [{model: one, stats: one.fisher}, {model: two, stats: two.fisher}]\n",
    "permuted": "models: [{model: one}, {model: two, align: permuted.transform}]\nparameters: {weight: 1}\n",
    "rotated": "models: [{model: one}, {model: two, align: rotated.transform}]\nparameters: {weight: 1}\n",
    "regmean": "models: [{model: one, stats: one.gram}, {model: two, stats: two.gram}]\n",
    "tsv": TWO,
    "iso_c": TWO,
    "stacked": "models: [{model: one}]\n",
}
OTHER_NAMES = {"permuted": "linear", "rotated": "linear", "stacked": "passthrough"}  # of their methods
# Transforms that rewrite a model before `linear` merges it: random elements of the groups of a Llama.
REWRITTEN: dict[str, tuple[ElementKind, ...]] = {
    "permuted": ("order",),
    "rotated": ("order", "scale", "rotation", "inside"),
}
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layer -> another with the same inputs
CHUNK = 8 << 20  # bytes per read or write of the floor


@dataclass(frozen=True)
class Cost:
    """The cost of a run: wall and processor seconds, and peak resident memory in bytes."""

    seconds: float
    cpu_s: float
    peak: int


# ------------------------------------------------------------------ checkpoints


def shapes(size: float) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of a Llama of `size` times 1.1 billion parameters, in two shards. Size 1 is TinyLlama's shape."""
    side = size ** (1 / 3)
    hidden, layers = max(64, 64 * round(32 * side)), max(2, round(22 * side))
    middle, vocab, heads = hidden * 11 // 4, max(256, round(32_000 * side * side)), hidden // 8
    embedding = {"model.embed_tokens.weight": (vocab, hidden)}
    head = {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (heads, hidden),
        "self_attn.v_proj": (heads, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    halves = [range(layers // 2), range(layers // 2, layers)]
    first, second = ({f"model.layers.{i}.{n}.weight": s for i in half for n, s in layer.items()} for half in halves)
    return [embedding | first, second | head]


def make_checkpoints(folder: Path, size: float) -> None:
    """Write the base, entries from N(0, 0.02), and three models, the base plus N(0, 0.001), tensor by tensor."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, model in enumerate(MODELS):
        model_folder = unfinished / model
        model_folder.mkdir(parents=True)
        names = [f"model-{s + 1:05d}-of-00002.safetensors" for s in range(2)]
        for name, shard in zip(names, shapes(size), strict=True):
            specs = [TensorSpec(tensor, shape, "bfloat16") for tensor, shape in shard.items()]
            write_shard(model_folder / name, specs, unfinished / MODELS[0] / name if number else None, number)
        weight_map = {tensor: name for name, shard in zip(names, shapes(size), strict=True) for tensor in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (model_folder / "config.json").write_text(json.dumps(config(size)))
    make_statistics(unfinished)
    make_transforms(unfinished)
    unfinished.rename(folder)


def config(size: float) -> dict[str, object]:
    """The config of a Llama of these shapes: 32 heads, each eight of them with one key."""
    first = {name: shape for shard in shapes(size) for name, shape in shard.items()}
    middle, hidden = first["model.layers.0.mlp.up_proj.weight"]
    return {
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in first),
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }


def make_transforms(folder: Path) -> None:
    """Write random transforms of the second model."""
    two = open_checkpoint(folder / "two")
    gains = {name: two.read(name) for name, spec in two.items() if len(spec.shape) == 1}
    for name, kinds in REWRITTEN.items():
        random_transform(gains, find_symmetries(two), seed=0, kinds=kinds).save(folder / f"{name}.transform")


def make_statistics(folder: Path) -> None:
    """Write Fisher information and Gram matrices for two of the models, entry by entry."""
    import torch

    for model in MODELS[1:3]:
        checkpoint = open_checkpoint(folder / model)
        facts = StatisticsInfo("fisher", (checkpoint.content,), "none", {}, examples=1, norm=1.0)
        specs = [TensorSpec(f"fisher/{spec.name}", spec.shape, "float32") for spec in checkpoint.values()]
        write_entries(folder / f"{model}.fisher", specs, facts, lambda x: x.square_())
        layers = {spec.name.removesuffix(".weight"): spec for spec in checkpoint.values() if is_linear(spec)}
        described = {
            name: Layer(spec.name, None, 1, spec.shape[1], shared_with(name), 1) for name, spec in layers.items()
        }
        facts = StatisticsInfo("gram", (checkpoint.content,), "none", {}, examples=1, layers=described)
        sides = {layer.entry: layer.inputs + 1 for layer in described.values()}
        specs = [TensorSpec(f"gram/{entry}", (side, side), "float32") for entry, side in sides.items()]
        write_entries(folder / f"{model}.gram", specs, facts, lambda x: x[:64].T @ x[:64] / 64 + torch.eye(len(x)))


def is_linear(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and not spec.name.startswith(("model.embed", "lm_head"))


def shared_with(layer: str) -> str:
    """The layer under which the inputs of this one are stored."""
    stem, _, name = layer.rpartition(".")
    return f"{stem}.{SHARED.get(name, name)}" if stem else layer


def write_entries(
    path: Path, specs: Sequence[TensorSpec], facts: StatisticsInfo, make: Callable[[Tensor], Tensor]
) -> None:
    """Write a statistics file; `make` turns normal numbers into an entry."""
    import torch

    header, _ = encode_header(specs, facts.metadata())
    random = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(header)
        for spec in specs:
            file.write(bytes_of(make(torch.randn(spec.shape, generator=random))))


def write_shard(path: Path, specs: Sequence[TensorSpec], base: Path | None, seed: int) -> None:
    """Write random tensors; with a base, its shard of the same layout plus small deltas."""
    import torch

    header, offsets = encode_header(specs, {"format": "pt"})
    random = torch.Generator().manual_seed(1000 * seed + int(path.name[6:11]))
    with path.open("wb") as file, (base or path).open("rb") as below:
        file.write(header)
        for spec in specs:
            values = torch.randn(spec.shape, generator=random).mul_(0.001 if base else 0.02)
            if base:
                below.seek(offsets[spec.name])
                values += torch.frombuffer(bytearray(below.read(spec.nbytes)), dtype=torch.bfloat16).view(spec.shape)
            file.write(bytes_of(values.bfloat16()))


def make_tiny(folder: Path) -> None:
    """Write the same models with one tensor of four numbers."""
    header, _ = encode_header([TensorSpec("w", (2, 2), "bfloat16")], {"format": "pt"})
    for number, model in enumerate(MODELS):
        (folder / model).mkdir(parents=True)
        data = b"".join((0x3F80 + number + i).to_bytes(2, "little") for i in range(4))  # a little over 1
        (folder / model / "model.safetensors").write_bytes(header + data)
    make_statistics(folder)
    table = Symmetries({}, {"w": ((Part(None, free="class"),), (Part(None, free="input"),))})
    for name in REWRITTEN:
        Transform(table, {}, TransformInfo("none")).save(folder / f"{name}.transform")


def write_recipes(folder: Path) -> None:
    recipes = dict(RECIPES)
    if layers := count_layers(folder):
        recipes |= dict.fromkeys(("tsv", "iso_c"), TWO + LAYERS)
        recipes["stacked"] = STACKED.format(half=layers // 2, layers=layers)
    for method, text in recipes.items():
        (folder / f"{method}.yaml").write_text(f"merge_method: {OTHER_NAMES.get(method, method)}\n{text}")


def count_layers(folder: Path) -> int:
    """The number of the models' layers; 0 for the tiny ones."""
    config = folder / MODELS[0] / "config.json"
    return int(json.loads(config.read_text())["num_hidden_layers"]) if config.exists() else 0


# ------------------------------------------------------------------ measuring


def weights(folder: Path, models: Iterable[str]) -> list[Path]:
    """The models' shards."""
    return [path for model in models for path in sorted((folder / model).glob("*.safetensors"))]


def inputs(method: str) -> list[str]:
    """The models that the method's recipe reads."""
    return [model for model in MODELS if f": {model}" in RECIPES[method]]


def read_by(folder: Path, method: str) -> list[Path]:
    """All files that the method's recipe reads."""
    others = [folder / name for name in re.findall(r"(?:stats|align): ([\w.]+)", RECIPES[method])]
    return weights(folder, inputs(method)) + others


def read(path: Path) -> None:
    """Read a file into one buffer and discard the data."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy(source: Path, target: Path, nbytes: int | None = None) -> None:
    """Copy a file, or its first bytes, through one buffer, and fsync it."""
    buffer, left = memoryview(bytearray(CHUNK)), source.stat().st_size if nbytes is None else nbytes
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
        while left and (count := file.readinto(buffer[:left])):
            out.write(buffer[:count])
            left -= count
        os.fsync(out.fileno())


def repeated_nbytes(folder: Path, method: str) -> int:
    """Bytes of the layers that an output has twice: the first half of a stack's."""
    if method != "stacked":
        return 0
    first = tuple(f"model.layers.{i}." for i in range(count_layers(folder) // 2))
    return sum(
        spec.nbytes for name, spec in open_checkpoint(folder / "one").items() if first and name.startswith(first)
    )


def floor(folder: Path, method: str, threads: int) -> float:
    """Seconds to read and discard the method's inputs and to write a copy of one of them."""
    sources = read_by(folder, method)
    copied, again = weights(folder, [inputs(method)[0]]), repeated_nbytes(folder, method)
    target = folder / "copy"
    target.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        jobs = [pool.submit(read, path) for path in sources]
        jobs += [pool.submit(copy, path, target / path.name) for path in copied]
        jobs += [pool.submit(copy, copied[0], target / "again", again)] if again else []
        for job in jobs:
            job.result()
        return time.monotonic() - started


def merge(folder: Path, method: str, options: Sequence[str], kernels: Path) -> Cost:
    """The cost of one merge in a process of its own."""
    command = [sys.executable, "-m", "mergekit_lfm", "merge", f"{method}.yaml", "out", "--quiet", *options]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"), "XDG_CACHE_HOME": str(kernels)}
    return run(command, folder, caches)


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Cost:
    """The cost of a command in a folder, with these variables in its environment besides."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} ended with exit code {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def prepare(folder: Path, method: str) -> None:
    """Restore the same state before every run: inputs cached, no output, no dirty pages."""
    for name in ("out", "copy"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in read_by(folder, method):
        read(path)
    os.sync()


def median(costs: Sequence[Cost], of: Callable[[Cost], float]) -> float:
    return statistics.median(of(cost) for cost in costs)


def measure(folder: Path, tiny: Path, method: str, repeats: int, threads: int, options: Sequence[str]) -> list[str]:
    """The table's row for a method."""
    with tempfile.TemporaryDirectory(dir=folder) as kernels:
        cache = Path(kernels)
        prepare(folder, method)
        cold = merge(folder, method, [*options, "--compile", "always"], cache)
        prepare(folder, method)
        eager = merge(folder, method, [*options, "--compile", "never"], cache)
        floors, costs, starts = [], [], []
        for _ in range(repeats):
            prepare(folder, method)
            floors.append(floor(folder, method, threads))
            prepare(folder, method)
            costs.append(merge(folder, method, options, cache))
            prepare(tiny, method)
            starts.append(merge(tiny, method, options, cache))
        prepare(folder, method)
    seconds, start, least = (
        median(costs, lambda c: c.seconds),
        median(starts, lambda c: c.seconds),
        statistics.median(floors),
    )
    return [
        method,
        str(len(inputs(method))),
        f"{seconds:.2f}",
        f"{start:.2f}",
        f"{least:.2f}",
        f"{(seconds - start) / least:.2f}",
        f"{median(costs, lambda c: c.cpu_s):.1f}",
        format_size(max(cost.peak for cost in costs)),
        f"{cold.seconds:.2f}",
        f"{eager.seconds:.2f}",
    ]


# ------------------------------------------------------------------ the report


def processor() -> str:
    """The processor's name according to Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.machine()


def heading(folder: Path, threads: int, repeats: int, options: Sequence[str]) -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = format_size(sum(path.stat().st_size for path in weights(folder, MODELS[:1])))
    return (
        f"{processor()}, {default_threads()} cores, {format_size(memory)} of memory; "
        f"Python {platform.python_version()}, torch {version('torch')}; {size} for each model, "
        f"{threads} threads, medians of {repeats}" + (f", options {' '.join(options)}" if options else "")
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="part of 1.1 billion parameters [default: 1]")
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="of merges and floors [default: the cores]"
    )
    parser.add_argument("--memory", type=parse_size, help="passed on to the merges")
    parser.add_argument("--device", help="passed on to the merges")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind [default: 3]")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), help="[default: all]")
    parser.add_argument(
        "--dir", type=Path, help="keep the checkpoints here for another run [default: a temporary folder]"
    )
    return parser.parse_args()


def main() -> None:
    """Make missing checkpoints, measure, and print a Markdown table."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="merge_vs_copy_") as temporary:
        work = (args.dir or Path(temporary)).absolute()
        folder, tiny = work / f"size_{args.size:g}", work / "tiny"
        if not folder.exists():
            # In a process of its own: a child's peak memory includes its parent's before the fork.
            maker = multiprocessing.get_context("spawn").Process(target=make_checkpoints, args=(folder, args.size))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit(f"the checkpoints could not be made in {folder}; is there room for them?")
        if not tiny.exists():
            make_tiny(tiny)
        for checkpoints in (folder, tiny):
            write_recipes(checkpoints)
        options = ["--threads", str(args.threads)]
        options += ["--memory", str(args.memory)] if args.memory else []
        options += ["--device", args.device] if args.device else []
        print(heading(folder, args.threads, args.repeats, options[2:]), end="\n\n")
        print("| method | inputs | merge s | start-up s | floor s | ratio | CPU s | peak memory | cold s | eager s |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for method in args.methods:
            row = measure(folder, tiny, method, args.repeats, args.threads, options)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
