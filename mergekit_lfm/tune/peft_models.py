"""PEFT's models: made for a tuning, and their trained part as an adapter or a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.runtime.quiet import quiet
from mergekit_lfm.runtime.tasks import PEFT_TASKS
from mergekit_lfm.tune.work import PeftAdapter, TuneWork


def attach(work: TuneWork, make: Callable[[Any], Any], expected: str) -> Any:
    """PEFT's model around the work's. make(peft): the config, without the task and the base.

    Raises PlanError if PEFT cannot make it. expected: by the model, for the message.
    """
    peft = import_extra("peft", "tuning an adapter", "tune")
    try:
        config = make(peft)
        config.task_type = PEFT_TASKS[work.task]
        with quiet():
            return peft.get_peft_model(work.model, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise PlanError(
            f"PEFT makes no such adapter for {type(work.model).__name__} ({reason(error)}); expected {expected}. "
            "Give them, or choose another method"
        ) from error


def save_of(model: Any, work: TuneWork) -> Callable[[], PeftAdapter]:
    """A function that gives the trained part of a model of PEFT's as a folder has it."""
    peft = import_extra("peft", "tuning an adapter", "tune")

    def save() -> PeftAdapter:
        with quiet():
            tensors = peft.get_peft_model_state_dict(model)
        facts = as_saved(model.peft_config["default"], work)
        return PeftAdapter(facts, {name: x.detach().contiguous() for name, x in tensors.items()})

    return save


def as_saved(config: Any, work: TuneWork) -> dict[str, Any]:
    """A config of PEFT's as its file has it, for the model of the work."""
    ours = {"inference_mode": True, "revision": None, "base_model_name_or_path": work.reference}
    return {**config.to_dict(), **ours, "peft_type": config.peft_type.value}
