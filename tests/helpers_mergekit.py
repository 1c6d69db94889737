"""The models of mergekit's cases, tiny, in a folder and in memory, and recipes merged there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llama import Tensors, base_tensors, cast, fine_tuned, load, save

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError


def on_a_grid(tensors: Tensors) -> Tensors:
    """Multiples of 1/1024, whose sums and differences are exact."""
    return {name: (x * 1024).round() / 1024 for name, x in tensors.items()}


class World:
    """BASE, models near it, some with exact relations to one another, and two of four layers, L47 and L48."""

    def __init__(self, folder: Path) -> None:
        self.folder, base = folder, on_a_grid(base_tensors())
        self.models = {"BASE": base, **{name: on_a_grid(fine_tuned(base, i)) for i, name in enumerate("ABC", 1)}}
        self.models["NEAR"] = fine_tuned(self.models["A"], 4, scale=1e-6)
        self.models["OPPOSITE"] = {name: 2 * base[name] - self.models["A"][name] for name in base}
        self.models |= {f"{name}16": cast(self.models[name], torch.bfloat16) for name in "AB"}
        self.models |= {f"COPY{i}": self.models["A16"] for i in range(10)}
        odd = {name: torch.arange(x.numel()).view(x.shape) % 2 * 0.25 for name, x in base.items()}
        self.models |= {"EVEN": {n: base[n] + odd[n] for n in base}, "ODD": {n: base[n] + 0.25 - odd[n] for n in base}}
        self.models |= {f"L4{i}": on_a_grid(base_tensors(seed=i, layers=4)) for i in (7, 8)}
        for name, tensors in self.models.items():
            save(folder / name, tensors)

    def __getitem__(self, name: str) -> Tensors:
        return self.models[name]

    def write(self, text: str, name: str) -> Path:
        """The recipe beside the models."""
        path = self.folder / f"{name}.yaml"
        path.write_text(text)
        return path

    def merge(self, text: str, out: Path, **options: Any) -> Tensors:
        """The result of a recipe."""
        return load(Path(merge(self.write(text, out.parent.name), out, **options)))

    def runner(self, folder: Path) -> Callable[..., Tensors]:
        """Merges a recipe into a new folder each time, and loads the result."""
        numbers = count()
        return lambda text, **options: self.merge(text, folder / f"out{next(numbers)}", **options)

    def refuse(self, text: str, out: Path) -> str:
        """The message about a recipe that is refused before anything is written."""
        with pytest.raises(PlanError) as caught:
            merge(self.write(text, out.parent.name), out)
        assert list(out.parent.iterdir()) == []
        return str(caught.value)
