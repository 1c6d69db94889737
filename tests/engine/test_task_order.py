"""The order of tasks: a large tensor is begun early, wherever it lies, so that no thread is left with it at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_lfm import plan_recipe
from mergekit_lfm.engine.run import HEAVY, Run
from mergekit_lfm.engine.shares import Share
from mergekit_lfm.engine.tasks import MergeTask
from mergekit_lfm.machine.accelerators import HOST

EACH = 1 << 17  # numbers of a tensor that is too large for a batch


def test_large_tensors_are_begun_first_and_the_others_in_file_order(tmp_path: Path) -> None:
    sizes = {f"layers.{i:02}.weight": EACH for i in range(HEAVY + 4)} | {"zz_head.weight": 3 * EACH}
    for name in ("one", "two"):
        tensors = {tensor: torch.ones(size, dtype=torch.bfloat16) for tensor, size in sizes.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("one", "two")]
    planned: Any = plan_recipe({"merge_method": "linear", "models": models}, tmp_path / "out")
    plan, begun = planned.result.plan, list[str]()

    def executor(tasks: Iterable[Any]) -> Iterator[Any]:
        begun.extend(plan.tensors[task.job].name for task in tasks if isinstance(task, MergeTask))
        return iter(())

    options: Any = SimpleNamespace(accelerator=HOST, share=1 << 30, device_share=1 << 30)
    output: Any = SimpleNamespace(done={})
    Run(plan, options, output, lambda _: None, Share(plan), set()).carry_out(executor)
    assert begun[0] == "zz_head.weight" and begun[1:] == [tensor for tensor in sizes if "layers" in tensor]
