"""Results of methods that follow from what the method is for, without its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm import merge, merge_tensors
from mergekit_lfm.errors import PlanError

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearswap_goes_nowhere_or_all_the_way(dtype: torch.dtype) -> None:
    base, other = (drawn(40, 30, dtype=dtype, seed=seed) for seed in range(2))
    assert torch.equal(merge_tensors("nearswap", [other], base=base, t=0), base)
    assert torch.equal(merge_tensors("nearswap", [other], base=base, t=1e9), other)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_keeps_changes_of_different_entries_whole(method: str) -> None:
    """ramplus_tl, too: models that share no entry have nothing to amplify by."""
    base, change = drawn(40, 30), drawn(40, 30, seed=1)
    first, second = (torch.where((torch.arange(1200) % 3 == i).view(40, 30), change, 0) for i in range(2))
    found = merge_tensors(method, [base + first, base + second], base=base)
    assert torch.allclose(found, base + first + second, rtol=0, atol=1e-6)


def test_ram_averages_changes_of_one_entry() -> None:
    base, one, two = (drawn(40, 30, seed=seed) for seed in range(3))
    assert torch.allclose(merge_tensors("ram", [one, two], base=base), (one + two) / 2, rtol=0, atol=1e-6)


def test_sce_takes_a_fine_tune_alone_as_it_is() -> None:
    base, tune = drawn(40, 30), drawn(40, 30, seed=1)
    assert torch.allclose(merge_tensors("sce", [tune], base=base), tune, rtol=0, atol=1e-6)
    with pytest.raises(PlanError, match="base"):
        merge_tensors("sce", [tune])


@pytest.mark.parametrize("shape", [(20_000, 1), (1,), ()])
def test_della_keeps_an_entry_alone_in_its_row_with_the_density(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape)
    found = merge_tensors("della_linear", [base + 1], base=base, weight=1, density=0.6, epsilon=0.3, rescale=False)
    assert bool(((found == 0) | (found == 1)).all())
    if shape == (20_000, 1):
        assert abs(float(found.mean()) - 0.6) < 5 * (0.6 * 0.4 / 20_000) ** 0.5


@pytest.mark.parametrize("density", [0.9, 0.1, [0.5, 0.9]])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_probabilities_of_della_beyond_0_and_1_are_refused_before_any_file(
    method: str, density: float | list[float], tmp_path: Path
) -> None:
    for i, name in enumerate(("base", "tune")):
        save_checkpoint(tmp_path / name, {f"layers.{n}.w": drawn(4, 6, seed=i) for n in range(3)}, {})
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "tune"), "parameters": {"weight": 1, "density": density}}],
    }
    with pytest.raises(PlanError, match=r"layers\.\d\.w: density .* choose an epsilon below 0\.1"):
        merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tune"]
