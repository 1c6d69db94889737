"""LiNeS: the merged delta of a layer grows with its depth, by a gradient for `lambda`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_methods import parameters_of
from models import save_checkpoint
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.api.contract import count_inputs
from mergekit_lfm.methods.registry import METHODS

NAMES = ["embed.weight", *(f"layers.{i}.weight" for i in range(4)), "head.weight"]
SCALED = [name for name, method in METHODS.items() if any(p.name == "lambda" for p in method.parameters)]
MORE: dict[str, dict[str, Any]] = {"pcb": {"scope": "tensor"}}  # one solve over the whole model has one lambda


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and fine-tunes of it, of four layers."""
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(6, 4, generator=random) for name in NAMES}
    models = [base] + [{n: x + 0.05 * torch.randn(6, 4, generator=random) for n, x in base.items()} for _ in range(3)]
    return [save_checkpoint(tmp_path_factory.mktemp("lines") / str(i), model, {}) for i, model in enumerate(models)]


def test_every_method_that_adds_a_merged_delta_to_a_required_base_takes_it() -> None:
    assert set(SCALED) == {name for name, m in METHODS.items() if m.base == "required"} - {"expo"}


@pytest.mark.parametrize("method", SCALED)
def test_the_delta_of_layer_l_is_scaled_by_a_plus_b_l(method: str, folders: list[Path], tmp_path: Path) -> None:
    def merged(**parameters: Any) -> dict[str, torch.Tensor]:
        recipe = {
            "merge_method": method,
            "base_model": str(folders[0]),
            "models": [{"model": str(path)} for path in folders[1 : 1 + count_inputs(method)]],
            "parameters": parameters_of(method, MORE.get(method, {})) | parameters,
        }
        out = tmp_path / str(parameters["lambda"])
        merge(recipe, out)
        return load_file(out / "model.safetensors")

    a, b = 0.25, 0.5
    plain, scaled, base = (
        merged(**{"lambda": 1}),
        merged(**{"lambda": [a, a + b]}),
        load_file(folders[0] / "model.safetensors"),
    )
    for name in NAMES:
        factor = a + b * int(name.split(".")[1]) / 3 if name.startswith("layers") else a
        expected = base[name] + factor * (plain[name] - base[name])
        assert torch.allclose(scaled[name], expected, rtol=0, atol=1e-6), name
