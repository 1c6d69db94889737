"""Gains of norms that a rotation changes: the readers stay finite, whatever the other model's gains are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_align import Tensors, furthest, loaded, rewritten_model, table, tensors_of, texts

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.artifacts.transform import Transform
from mergekit_lfm.collect.run import collect
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.rewritten import rewrite

transformers = pytest.importorskip("transformers")

FINAL, INNER = "model.norm.weight", "model.layers.0.post_attention_layernorm.weight"
NORMS = ("final", "mlp.0")  # in the table's names
UNITS = (3, 7)  # whose gains are strange


def outputs(checkpoint: Checkpoint, tensors: Tensors) -> torch.Tensor:
    """The logits of a model with these tensors, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    model.load_state_dict({name: x.double() for name, x in tensors.items()}, strict=False)
    with torch.no_grad():
        logits: torch.Tensor = model(**texts(count=1)[0]).logits
    return logits


def with_gains(model: Checkpoint, value: float) -> Tensors:
    """The tensors with this gain in some units of two norms."""
    tensors = tensors_of(model)
    for name in (FINAL, INNER):
        tensors[name] = tensors[name].clone()
        tensors[name][list(UNITS)] = value
    return tensors


def aligned(folder: Path, dtype: torch.dtype, value: float, dtype_of_a: torch.dtype | None = None) -> Transform:
    """B to A with some gains equal to `value`; the rewritten B holds finite numbers and has the same outputs."""
    a = loaded("llama", 0, folder / "a", dtype_of_a or dtype)
    b = loaded("llama", 1, folder / "b", dtype)
    options = {"symmetries": table(b), "symmetries_to": table(a), "sweeps": 2}
    transform = find_transform(b, with_gains(a, value), "rotation", **options)  # type: ignore[arg-type]
    moved = rewrite(tensors_of(b), transform)
    assert all(bool(x.isfinite().all()) for x in moved.values())
    assert furthest(moved, tensors_of(b)) > 0.1
    expected, found = outputs(b, tensors_of(b)), outputs(b, moved)
    rough = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.2}[dtype]
    assert float((found - expected).abs().max() / (expected - expected.mean()).abs().max()) < rough
    gains = tensors_of(a)[FINAL].to(dtype)
    straight = [unit for unit in range(len(gains)) if unit not in UNITS]
    assert torch.equal(moved[FINAL][straight], gains[straight])
    assert torch.equal(transform.gains[NORMS[0]].new.to(dtype), moved[FINAL])
    return transform


def new(transform: Transform) -> list[float]:
    """The new gains of the strange units, which are the same in both norms."""
    found = [transform.gains[norm].new[list(UNITS)].tolist() for norm in NORMS]
    assert found[0] == found[1]
    gains: list[float] = found[0]
    return gains


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 0.0),
        (torch.float16, 6e-8),  # readers of about 1 would be 1e7, and float16 ends at 65504
        (torch.float16, 1e-6),
        (torch.float16, -6e-7),
        (torch.float16, 6e4),  # readers would lose most digits below 6e-5
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e-40),
        (torch.float32, -1e-30),
        (torch.float64, 1e-300),
        (torch.float64, 5e-324),  # their 1 / gain is infinite
    ],
)
def test_gains_by_which_readers_cannot_be_divided_become_one(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    assert new(aligned(tmp_path, dtype, value)) == [1, 1]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 2.0**-10),
        (torch.float16, -(2.0**-12)),
        (torch.float16, 512.0),
        (torch.bfloat16, 2.0**-40),
        (torch.bfloat16, 2.0**40),
        (torch.float32, 2.0**-40),
        (torch.float64, -(2.0**-50)),
    ],
)
def test_all_others_are_those_of_the_other_model(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    assert new(aligned(tmp_path, dtype, value)) == [value, value]


def test_gains_that_the_sources_dtype_does_not_hold_become_one(tmp_path: Path) -> None:
    for i, value in enumerate((1e-20, 1e20)):  # 0 and infinity in float16
        assert new(aligned(tmp_path / str(i), torch.float16, value, torch.float32)) == [1, 1]
    assert new(aligned(tmp_path / "fine", torch.float16, 0.1, torch.float32)) == [float(torch.tensor(0.1).half())] * 2


def test_so_it_is_with_statistics(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed), torch.float16) for seed in range(2))
    strange = rewritten_model(a, with_gains(a, 6e-8), tmp_path / "strange")
    file = collect("cross", strange.path, texts(), tmp_path / "ab", other=b.path, task="lm").path
    transform = find_transform(b, strange, "rotation", statistics=file)
    assert all(bool(x.isfinite().all()) for x in rewrite(tensors_of(b), transform).values())
    assert new(transform) == [1, 1]
