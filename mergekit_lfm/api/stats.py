"""`collect_stats`: from a model and data to a statistics file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.collect.run import Task, collect
from mergekit_lfm.machine.progress import SILENCE, Progress


def collect_stats(
    kind: str,
    model: nn.Module | StrPath,
    data: StrPath | Iterable[Any],
    out: StrPath,
    *,
    other: nn.Module | StrPath | None = None,
    task: Task = "classification",
    checkpoint: StrPath | None = None,
    other_checkpoint: StrPath | None = None,
    layers: Sequence[str] = (),
    batch_size: int = 16,
    window: int | None = None,
    max_examples: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    memory: int | str | None = None,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **parameters: Any,
) -> Outcome[Statistics]:
    """Run a model on data and write what merges, alignments and edits need of it: a statistics file.

    kind: "gram" for the second moments of the inputs of every linear layer, "cross" for those between the same layers
    of the model and of `other`, "fisher" for the diagonal Fisher information of every parameter. model, other: folders,
    models on the Hub, or modules; a module is named by the `checkpoint` that it was loaded from. data: a .jsonl, .txt
    or .npz file, or batches. task: what the model does. layers: keep only those with one of these texts in their names.
    memory: bytes, or text such as "2GB", for sums. threads: how many torch uses while this runs. parameters: of the
    kind, for "fisher" `labels`, `samples` and `seed`. `mergekit_lfm.collect.run.collect` explains all of them.

    A run that was interrupted goes on from OUT.partial unless resume is False. If `out` holds the statistics of the
    same request already, nothing is written. The outcome's digest is that of the file's content. Raises PlanError for
    a request that cannot be met, FormatError for files that do not fit each other and for NaN; ImportError if
    transformers, which loads models, is not installed.
    """
    started, file = time.monotonic(), expand(out)
    options: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "window": window, "device": device}
    options |= {"max_examples": max_examples, "dtype": dtype, "memory": memory, "resume": resume}
    before = _state(file)
    with set_threads(threads), progress.by_count("examples", "collecting") as count:
        statistics = collect(
            kind,
            _as_model(model),
            expand(data, "data") if isinstance(data, str | PathLike) else data,
            file,
            other=None if other is None else _as_model(other),
            task=task,
            checkpoint=None if checkpoint is None else expand(checkpoint),
            other_checkpoint=None if other_checkpoint is None else expand(other_checkpoint),
            overwrite=overwrite,
            progress=count,
            **options,
            **parameters,
        )
    there = _state(file) == before
    return Outcome(file, statistics, statistics.tensors.content, there, seconds=time.monotonic() - started)


def _as_model(model: nn.Module | StrPath) -> nn.Module | Path:
    return model if isinstance(model, nn.Module) else model_folder(model)


def _state(file: Path) -> tuple[int, int] | None:
    """The identity of a file, by which a new one is known; None without a file."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


@contextmanager
def set_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads meanwhile; None leaves their number."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
