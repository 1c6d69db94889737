"""`trace_facts`: the layers and tokens through which a saved model knows facts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.edit import Facts
from mergekit_lfm.api.efficacy import load_for_texts
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.artifacts.facts import as_facts
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.files import paths_in
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.hub import display_name
from mergekit_lfm.store.places import check_file

if TYPE_CHECKING:
    from mergekit_lfm.edit.trace import Trace


def trace_facts(
    model: StrPath,
    facts: Facts,
    out: StrPath | None = None,
    *,
    noise: float = 3.0,
    window: int = 1,
    draws: int = 2,
    seed: int = 0,
    batch: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Trace]:
    """Find the layers and tokens through which a saved model knows facts, by causal tracing.

    facts: those that the model knows, a facts file or its data. out: a JSON file for all numbers. noise: the standard
    deviation of the noise on the subject, as a multiple of that of the subjects' embeddings; draws of it for each fact.
    window: the number of layers around one whose MLP or attention outputs are put back together. batch: runs of the
    model at a time. dtype, device: of the running model. `result.layers()` suggests layers to edit.
    """
    started = time.monotonic()
    known, folder = as_facts(facts), model_folder(model)
    file = None if out is None else expand(out)
    if file is not None:
        check_file(
            file, [*paths_in(folder), *([expand(facts)] if isinstance(facts, str | Path) else [])], overwrite=overwrite
        )
    loaded = load_for_texts(folder, dtype, device)
    from mergekit_lfm.edit.trace import trace

    how: dict[str, Any] = {"noise": noise, "window": window, "draws": draws, "seed": seed, "batch": batch}
    with progress.by_count(" facts", "tracing") as count:
        traced = trace(loaded.model, loaded.tokenizer, known, progress=count, **how)
    if file is not None:
        replace_file(file, json.dumps({"model": display_name(folder), **traced.as_data()}, indent=1).encode())
    return Outcome(file, traced, seconds=time.monotonic() - started)
