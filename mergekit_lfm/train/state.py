"""The state of a training in a file: enough to go on to the same bytes.

It holds the trained parameters, the buffers, the optimizer's moments and the memory of hooks, and as facts the step and
the request that is being answered. Random numbers need no state: each step has a seed of its own. The record of the
steps is the file of metrics beside it, which is written first, so that it has at least the steps of the state.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.header import Kind, save_tensors
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import read_header
from mergekit_lfm.train.hooks import Hook, Parameters

TRAINING = Kind("training", "mergekit-lfm tune", "start anew")
METRICS = "metrics.jsonl"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


@dataclass
class Looked:
    """The looks at the development set so far. best: the least loss; waits: looks since then."""

    best: float | None = None
    best_step: int = 0
    waits: int = 0


@dataclass
class State:
    """A training between two steps. done: steps. record: a line for each step, as the file of metrics has it.

    kept: the best parameters so far, if there is a development set.
    """

    model: nn.Module
    parameters: Parameters
    optimizer: torch.optim.Optimizer
    hooks: Sequence[Hook]
    done: int = 0
    record: list[dict[str, Any]] = field(default_factory=list)
    looked: Looked = field(default_factory=Looked)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by names that say what they are."""
        found = {f"parameter/{name}": x.detach() for name, x in self.parameters.items()}
        found |= {f"buffer/{name}": x for name, x in self.model.named_buffers()}
        for name, x in self.parameters.items():
            moments = self.optimizer.state.get(x, {})
            found |= {f"{moment}/{name}": moments[moment] for moment in MOMENTS if moment in moments}
            if "step" in moments:
                found[f"step/{name}"] = torch.as_tensor(moments["step"], dtype=torch.float32).reshape(1)
        for number, hook in enumerate(self.hooks):
            found |= {f"hook/{number}/{name}": x for name, x in hook.memory.items()}
        return found | {f"kept/{name}": x for name, x in self.kept.items()}

    def save(self, path: Path, request: str) -> None:
        """Write the metrics, then the state; an earlier one is replaced at once, or not at all."""
        lines = "".join(json.dumps(line) + "\n" for line in self.record)
        replace_file(path.with_name(METRICS), lines.encode())
        whole = self.tensors()
        scalars = [name for name, x in whole.items() if not x.ndim]  # a file has none
        parts = {name: x.detach().reshape(1) if name in scalars else x for name, x in whole.items()}
        looked = self.looked
        facts = {
            "request": request,
            "done": self.done,
            "scalars": scalars,
            "looked": [looked.best, looked.best_step, looked.waits],
        }
        specs = [spec_of(name, x) for name, x in parts.items()]
        save_tensors(path, specs, parts.__getitem__, TRAINING.encode(facts))

    @torch.no_grad()
    def restore(self, path: Path, request: str) -> bool:
        """Go on from a file; False, and nothing changed, if it is not there, damaged, or of another request."""
        try:
            metadata = read_header(path).metadata
            facts = TRAINING.decode(metadata, ("request", "done", "scalars", "looked"), dict, path)
            record = read_record(path.with_name(METRICS), facts["done"])
            if facts["request"] != request or len(record) < facts["done"]:
                return False
            stored = open_checkpoint(path)
        except (FormatError, OSError):
            return False
        for name, x in self._places():
            if name in stored:
                x.copy_(stored.read(name).view(x.shape))
        for name, x in self.parameters.items():
            if f"step/{name}" in stored:
                moments = {moment: stored.read(f"{moment}/{name}").view(x.shape).to(x.device) for moment in MOMENTS}
                self.optimizer.state[x] = {"step": stored.read(f"step/{name}").reshape(()).to(x.device), **moments}
        for number, hook in enumerate(self.hooks):
            hook.restore(_read_under(f"hook/{number}/", stored, facts["scalars"]))
        self.kept = _read_under("kept/", stored, facts["scalars"])
        self.done, self.looked = facts["done"], Looked(*facts["looked"])
        self.record = record
        return True

    def _places(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"parameter/{name}", x) for name, x in self.parameters.items())
        yield from ((f"buffer/{name}", x) for name, x in self.model.named_buffers())


def read_record(path: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of the first steps in a file of metrics; [] for a file that is not there or damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [line for line in lines if line["step"] <= steps]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _read_under(start: str, stored: Checkpoint, scalars: Container[str]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names. scalars: the names of those without axes."""
    shapes = {name: () if name in scalars else spec.shape for name, spec in stored.items() if name.startswith(start)}
    return {name.removeprefix(start): stored.read(name).view(shape) for name, shape in shapes.items()}
