"""Prompts in a tuning: the room that they leave to texts, and whether a model takes them."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.runtime.load import Loaded, embeddings, logits, run
from mergekit_lfm.runtime.prompts import behind
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.tune.work import Prepared


def leave_room(recipe: TrainingRecipe, loaded: Loaded, count: int) -> Loaded:
    """The loaded model with so many virtual tokens before each text. Raises PlanError for a window beyond the rest."""
    if not count:
        return loaded
    room = behind(loaded, count)
    if recipe.window is not None and room.positions is not None and recipe.window > room.positions:
        raise PlanError(
            f"window is {recipe.window}, and {count} virtual tokens stand before it: {recipe.window + count} tokens in "
            f"the {loaded.positions} positions of {recipe.model}; expected at most {room.positions}"
        )
    return room


def check_lengths(examples: Examples, loaded: Loaded, place: Path) -> None:
    """Raise PlanError for texts that are too long behind a prompt, as arrays can be."""
    if not loaded.virtual or loaded.positions is None:
        return
    longest = max((len(item["input_ids"]) for item in examples.items if "input_ids" in item), default=0)
    if longest > loaded.positions:
        raise PlanError(
            f"{place}: found a text of {longest} tokens behind {loaded.virtual} virtual ones, expected at most "
            f"{loaded.positions + loaded.virtual} in all, the positions of the model; cut the texts"
        )


def check_prompt(recipe: TrainingRecipe, prepared: Prepared) -> None:
    """Raise PlanError if the model does not run with a prompt, or sees nothing of it."""
    if recipe.declaration.makes not in ("prompt", "mixture", "template"):
        return
    prompt = [x for name, x in prepared.model.named_parameters() if x.requires_grad and "modules_to_save" not in name]
    ids = torch.tensor([[0, 1]], device=prompt[0].device)
    cure = f"does not run with {recipe.method}"
    try:
        output = run(prepared.model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        seen = embeddings(output) if recipe.task == "embedding" else logits(output)
        (seen.square() * torch.arange(1, seen.numel() + 1, device=seen.device).view(seen.shape)).sum().backward()  # type: ignore[no-untyped-call]
    except PlanError as error:
        why = f" ({reason(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        raise PlanError(f"{recipe.model} {cure}{why}; choose `prompt`, which models of texts take") from None
    used = any(x.grad is not None and bool(x.grad.any()) for x in prompt)
    prepared.model.zero_grad()
    if not used:
        raise PlanError(f"{recipe.model} {cure}: its output does not depend on it; choose another method")
