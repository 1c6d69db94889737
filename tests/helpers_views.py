"""A small checkpoint in two files, one view of each kind over it, and the memory that reading takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from models import save_checkpoint
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch.experts import Form, layouts
from mergekit_lfm.arch.table import Units, read_table
from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergekit_lfm.views.adapted import adapt
from mergekit_lfm.views.base import View
from mergekit_lfm.views.blank import Blank
from mergekit_lfm.views.experts import Regrouped
from mergekit_lfm.views.patched import Patched, summed_changes
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.quantisation import dequantise
from mergekit_lfm.views.reindexed import Reindexed, Run
from mergekit_lfm.views.renamed import Renamed
from mergekit_lfm.views.resized import Resized
from mergekit_lfm.views.rewritten import Rewritten
from mergekit_lfm.views.selected import Selected

ROWS = ("up.weight", "up.bias")
Tensors = dict[str, torch.Tensor]

# Matrices of two panels each, 2^18 elements being one; of odd sizes; and what has fewer axes.
SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"up.weight": (301, 901), "up.bias": (301,), "down.weight": (1033, 301), "scale": (), "none": (0, 5)}
)
TABLE = "up.weight ffn input\nup.bias ffn\ndown.weight residual ffn'\nscale\nnone class input"
GROUPS = {"ffn": Units(301, "positive"), "residual": Units(1033, "sign")}


def plain_tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random tensors of these shapes."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def save_plain(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint in two files."""
    return save_checkpoint(folder, plain_tensors(dtype), {}, shards=2)


def fp8_config(block: Sequence[int] | None = (128, 128)) -> dict[str, Any]:
    """A config as DeepSeek-V3 has it."""
    size = None if block is None else list(block)
    return {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size}}


def quantise(x: torch.Tensor, block: Sequence[int] | None = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as float8, and the scales of its blocks: float32, the largest entry of each over 448."""
    height, width = block or x.shape
    tall, wide = -(-x.shape[0] // height) * height, -(-x.shape[1] // width) * width
    padded = torch.nn.functional.pad(x.abs(), (0, wide - x.shape[1], 0, tall - x.shape[0]))
    scales = padded.view(tall // height, height, wide // width, width).amax((1, 3)) / 448
    return (x / spread(scales, x.shape, block)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None) -> torch.Tensor:
    """The scale of every entry."""
    height, width = block or shape
    rows, columns = torch.arange(shape[0]) // height, torch.arange(shape[1]) // width
    return scales.view(-(-shape[0] // height), -1)[rows[:, None], columns]


def fp8_tensors(tensors: Mapping[str, torch.Tensor], block: Sequence[int] | None = (128, 128)) -> Tensors:
    """The matrices as FP8, each before its scales; all others as they are."""
    made: Tensors = {}
    for name, x in tensors.items():
        if x.ndim == 2 and x.numel():
            made[name], made[f"{name}_scale_inv"] = quantise(x.float(), block)
        else:
            made[name] = x
    return made


def save_fp8(folder: Path) -> Path:
    """The matrices as FP8 with blocks cut at the edges; scales and weights are in different files."""
    return save_checkpoint(folder, fp8_tensors(plain_tensors()), fp8_config(), shards=2)


def make_patch(
    checkpoint: Checkpoint, names: Sequence[str] = ("up.weight",), replaced: Sequence[str] = (), rank: int = 5
) -> Patch:
    """A patch that adds random products to matrices, and replaces other tensors by ones."""
    draw = torch.Generator().manual_seed(1)
    changes, tensors = {}, {}
    for name in names:
        rows, columns = checkpoint[name].shape
        tensors[f"{name}.left"] = torch.randn(rows, rank, generator=draw)
        tensors[f"{name}.right"] = torch.randn(rank, columns, generator=draw)
        changes[name] = TensorChange("low_rank", (rows, columns), checkpoint[name].dtype, None)
    for name in replaced:
        spec = checkpoint[name]
        tensors[name] = torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
        changes[name] = TensorChange("replace", spec.shape, spec.dtype, None)
    return Patch(PatchInfo("by hand", changes), tensors)


def rewritten(checkpoint: Checkpoint) -> View:
    """The checkpoint with its units in another order, and scaled."""
    table = read_table(TABLE, GROUPS, checkpoint)
    return Rewritten(checkpoint, random_transform({}, table, seed=2, kinds=["order", "scale"]), {"transform": "random"})


def narrowed(checkpoint: Checkpoint) -> View:
    """The checkpoint with some of its units."""
    table = read_table(TABLE, GROUPS, checkpoint)
    units = torch.arange(301)
    elements = {"ffn": UnitsElement(units[units % 6 > 0]), "residual": UnitsElement(torch.arange(900))}
    return Rewritten(checkpoint, Transform(table, elements, TransformInfo("by hand")), {"units": "by hand"})


def rotated(checkpoint: Checkpoint) -> View:
    """The checkpoint with the rows of a matrix mixed, so that it is made at once."""
    groups = {"ffn": Units(301), "residual": Units(1033, rotation="orthogonal")}
    table = read_table(TABLE, groups, checkpoint)
    return Rewritten(checkpoint, random_transform({}, table, seed=2, kinds=["rotation"]), {"transform": "rotation"})


def patched(checkpoint: Checkpoint) -> View:
    """The checkpoint with a matrix changed, and a vector and a scalar replaced."""
    return Patched(checkpoint, [make_patch(checkpoint, replaced=("up.bias", "scale"))], {"patches": ["by hand"]})


def changes(checkpoint: Checkpoint) -> View:
    """A patch's changes alone."""
    return summed_changes([make_patch(checkpoint, ("up.weight", "down.weight"))], checkpoint, checkpoint.files[0].path)


def renamed(checkpoint: Checkpoint) -> View:
    """The checkpoint with `layer.` before the names of weights, and a vector under another name."""
    return Renamed(checkpoint, [RenameRule(r"re:^(\w+)\.weight", r"layer.\1.weight"), RenameRule("up.b", "b")])


def save_experts(folder: Path) -> Path:
    """Three experts in two tensors, and a vector."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (3, 2 * 101, 301), "down_proj": (3, 301, 101), "router": (3, 301)}
    return save_checkpoint(folder, {f"mlp.experts.{n}": torch.randn(s, generator=draw) for n, s in shapes.items()}, {})


def experts(checkpoint: Checkpoint, *forms: Form) -> Checkpoint:
    """The checkpoint with its experts in one form after another."""
    for form in forms:
        layout = layouts()[0]
        checkpoint = Regrouped(checkpoint, layout, layout.find(checkpoint), form)
    return checkpoint


def selected(checkpoint: Checkpoint) -> View:
    """Two of the tensors, one of them under another name."""
    return Selected(checkpoint, {"up.weight": "up.weight", "layers.3.b": "up.bias"})


def reindexed(checkpoint: Checkpoint, runs: Sequence[Run], padding: int = 0) -> View:
    """The checkpoint with other rows in a matrix and a vector, some as if they were of another one."""
    return Reindexed(checkpoint, [checkpoint], {name: [name, name] for name in ROWS}, runs, padding)


def pending(checkpoint: Checkpoint) -> View:
    """The checkpoint before its alignment."""
    return Pending(checkpoint, checkpoint, dict.fromkeys(checkpoint, 100), 1000, {"align": "later"})


def adapted(checkpoint: Checkpoint, *, dora: bool = False, exact: bool = False) -> View:
    """The checkpoint with a LoRA of two matrices, or a DoRA of columns, a new vector and a few rows."""
    draw = torch.Generator().manual_seed(3)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 2,
        "trainable_token_indices": {"down": [5, 900]},
    }
    tensors = {"up.bias": torch.ones(301), "down.trainable_tokens_delta": torch.zeros(2, 301)}
    for name in ("up", "down"):
        rows, columns = SHAPES[f"{name}.weight"]
        a, b = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        turned = dora and name == "up"  # as if the model stored [in, out]
        tensors |= {f"{name}.lora_A.weight": b.T if turned else a, f"{name}.lora_B.weight": a.T if turned else b}
    if dora:
        config["use_dora"] = True
        tensors |= {"up.lora_magnitude_vector": torch.ones(901), "down.lora_magnitude_vector": torch.ones(1033)}
    folder = checkpoint.path.with_name(f"{checkpoint.path.name}-adapter-{dora}")
    if not folder.exists():
        folder.mkdir()
        save_file({f"base_model.model.{n}": x.contiguous() for n, x in tensors.items()}, folder / ADAPTER_WEIGHTS[0])
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    view = adapt(checkpoint, [AdapterRef("adapter", folder, 0.5)], "model", exact=exact)
    assert isinstance(view, View)
    return view


Case = tuple[Callable[[Path], Path], Callable[[Checkpoint], Checkpoint]]  # saves a checkpoint, and makes a view of it

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "rewritten": (save_plain, rewritten),
        "rewritten, float32": (lambda folder: save_plain(folder, torch.float32), rewritten),
        "narrowed": (save_plain, narrowed),
        "rotated": (save_plain, rotated),
        "rotated, float32": (lambda folder: save_plain(folder, torch.float32), rotated),
        "patched": (save_plain, patched),
        "patched, float32": (lambda folder: save_plain(folder, torch.float32), patched),
        "changes": (save_plain, changes),
        "renamed": (save_plain, renamed),
        "renamed over patched over renamed": (
            save_plain,
            lambda x: Renamed(patched(Renamed(x, [RenameRule("none", "void")])), [RenameRule("", "model.")]),
        ),
        "selected": (save_plain, selected),
        "blank": (save_plain, lambda x: Blank(x.path, {name: spec for name, spec in x.items() if spec.numel})),
        "cut": (save_plain, lambda x: Resized(x, ROWS, 290, x)),
        "filled over cut": (save_plain, lambda x: Resized(Resized(x, ROWS, 290, x), ROWS, 301, x)),
        "reindexed": (save_plain, lambda x: reindexed(x, [Run(0, 200, ((0, 100),)), Run(200, 120, ((1, 7),))])),
        "reindexed, with means and padding": (
            lambda folder: save_plain(folder, torch.float32),
            lambda x: reindexed(x, [Run(0, 299, ((0, 0), (1, 2))), Run(299, 3, ()), Run(302, 1, ((0, 300),))], 40),
        ),
        "reindexed, cut": (save_plain, lambda x: reindexed(x, [Run(0, 290, ((0, 0),))])),
        "experts apart": (save_experts, lambda x: experts(x, "apart")),
        "experts turned": (save_experts, lambda x: experts(x, "turned")),
        "experts apart over turned": (save_experts, lambda x: experts(x, "turned", "apart")),
        "experts together over apart": (save_experts, lambda x: experts(x, "apart", "together")),
        "experts turned over apart": (save_experts, lambda x: experts(x, "apart", "turned")),
        "dequantised": (save_fp8, lambda x: dequantise(x)),
        "patched over dequantised over renamed": (
            save_fp8,
            lambda x: patched(dequantise(Renamed(x, [RenameRule("none", "void")]))),
        ),
        "adapted": (save_plain, adapted),
        "adapted, float32": (lambda folder: save_plain(folder, torch.float32), lambda x: adapted(x, dora=True)),
        "adapted, before rounding": (save_plain, lambda x: adapted(x, dora=True, exact=True)),
        "patched over adapted over dequantised": (save_fp8, lambda x: patched(adapted(dequantise(x)))),
        "patched over rotated over rewritten": (save_plain, lambda x: patched(rotated(rewritten(x)))),
    }
)


def open_case(name: str, folder: Path) -> tuple[Checkpoint, View]:
    """The checkpoint of a case, and its view of it."""
    save, view_of = CASES[name]
    stored = open_checkpoint(save(folder))
    view = view_of(stored)
    assert isinstance(view, View)
    return stored, view


def peak_nbytes(work: Callable[[], object]) -> int:
    """The most bytes that torch holds for the processor's tensors at a time during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
