"""Statistics of models on a GPU equal the CPU's. On a pretended GPU, and on a real one if present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_collect import OutOfSight, Tied, arrays, convolutional, mlp, texts, transformer
from helpers_device import GPU, pretended_gpu
from torch import Tensor, nn

from mergekit_lfm.collect.run import collect
from mergekit_lfm.runtime.batches import Batch
from mergekit_lfm.views.maps import CPU

Data = Callable[[Sequence[int]], list[Batch]]
LM = {"task": "lm"}
CASES: dict[str, tuple[str, Callable[[], nn.Module], Data, dict[str, Any]]] = {
    "gram": ("gram", lambda: transformer("llama"), texts(7), LM),
    "gram of Conv1D": ("gram", lambda: transformer("gpt2"), texts(7), LM),
    "cross": ("cross", lambda: transformer("gpt2"), texts(7), LM),
    "fisher of a Llama": ("fisher", lambda: transformer("llama"), texts(7), LM | {"labels": "sampled"}),
    "fisher of texts": ("fisher", lambda: transformer("bert"), texts(7, labels=3), {"labels": "true"}),
    "fisher of embeddings": ("fisher", lambda: transformer("encoder"), texts(7), {"task": "embedding"}),
    "fisher of tied weights": ("fisher", lambda: Tied().double(), texts(7), LM | {"labels": "true"}),
    "fisher of all classes": ("fisher", lambda: mlp(6, 8, 4), arrays(6), {"labels": "expected"}),
    "fisher of drawn classes": ("fisher", lambda: mlp(6, 8, 4), arrays(6), {"labels": "sampled", "samples": 2}),
    "fisher of images": ("fisher", convolutional, arrays(1, 8, 8), {"labels": "expected"}),
    "fisher one by one": ("fisher", lambda: OutOfSight().double(), arrays(6), {"labels": "expected"}),
}


@pytest.fixture(params=CASES)
def collected(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[torch.device], dict[str, Tensor]]:
    """The entries of the statistics collected from a model on a device."""
    kind, make, data, options = CASES[request.param]

    def moments_on(device: torch.device) -> dict[str, Tensor]:
        torch.manual_seed(3)
        given = {"task": "classification", **options}
        model = make().to(device)
        if kind == "cross":
            given["other"] = transformer("gpt2", seed=4).to(device)
        found = collect(kind, model, data([3, 2]), tmp_path / f"{device.type}.st", **given).tensors
        return {name: found.read(name) for name in found}

    return moments_on


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest difference of an entry, relative to the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - x).abs().max()) for name, x in expected.items()) / largest


def test_a_gpu_collects_the_same_as_the_cpu(collected: Callable[[torch.device], dict[str, Tensor]]) -> None:
    expected = collected(CPU)
    with pretended_gpu() as gpu:
        found = collected(GPU)
    assert furthest(found, expected) <= 1e-6  # they are stored in float32
    assert gpu.there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_real_gpu_agrees_within_rounding(collected: Callable[[torch.device], dict[str, Tensor]]) -> None:
    assert furthest(collected(torch.device("cuda")), collected(CPU)) <= 1e-5  # norms are computed in float32
