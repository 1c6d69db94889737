"""Multi-head routing: what PEFT has trained for several tasks, as one LoRA for each, which can be merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.quiet import quiet
from mergekit_lfm.tune.peft_models import as_saved
from mergekit_lfm.tune.work import PeftAdapter, TuneWork

NAME = "default"  # of PEFT's only adapter
TASKS = "tasks"  # the folder inside of the adapter's with one for each task


def begin_evenly(model: nn.Module, heads: int) -> None:
    """Give the number after the last task, which has no examples, the same weight for every skill, for good.

    Raises PlanError if the heads do not divide a layer's inputs and outputs.
    """
    for name, layer in _routed(model):
        if layer.in_features % heads or layer.out_features % heads:
            raise PlanError(
                f"heads is {heads}; expected a divisor of the {layer.in_features} inputs and {layer.out_features} "
                f"outputs of {name}. Choose another, or other targets"
            )
        layer.poly_router[NAME].module_logits.data[-1].zero_()


def collapse(peft: Any, model: Any, work: TuneWork) -> PeftAdapter:
    """The LoRA of all skills alike, for a task to come, and in folders those of the tasks.

    Of a head, weights w_s = sigmoid(z_s) / their sum; A = sum of w_s A_s, B likewise; heads cut the inputs of A and the
    outputs of B. Source: Caccia et al. 2022, arXiv 2211.03831, equations 2 to 5.
    """
    config = model.peft_config[NAME]
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=1,  # of PEFT's routing, which divides by the rank
        target_modules=sorted(config.target_modules),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
    )
    facts = as_saved(lora, work)
    with quiet():
        state = peft.get_peft_model_state_dict(model)
    whole = {name: x.detach().contiguous() for name, x in state.items() if ".poly_" not in name}
    layers = dict(_routed(model))

    def of_task(task: int) -> dict[str, Tensor]:
        return whole | {key: x for name, layer in layers.items() for key, x in _products(name, layer, task).items()}

    parts = {f"{TASKS}/{name}": PeftAdapter(facts, of_task(task)) for task, name in enumerate(work.tasks)}
    return PeftAdapter(facts, of_task(len(work.tasks)), parts)


def _routed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "poly_lora_A"))


@torch.no_grad()
def _products(name: str, layer: Any, task: int) -> dict[str, Tensor]:
    """The matrices of a layer for a task, by PEFT's names for LoRA."""
    left, right = layer.poly_lora_A[NAME], layer.poly_lora_B[NAME]  # [heads, skills, inputs, r], [.., r, outputs]
    shares = layer.poly_router[NAME].module_logits[task].view(left.shape[:2]).sigmoid()
    shares = shares / shares.sum(-1, keepdim=True)
    inputs = torch.einsum("qs,qsdr->qdr", shares, left).flatten(0, 1)  # [inputs, r]
    outputs = torch.einsum("qs,qsrd->qdr", shares, right).flatten(0, 1)  # [outputs, r]
    return {f"{name}.lora_A.weight": inputs.T.contiguous(), f"{name}.lora_B.weight": outputs.contiguous()}
