"""Prompts in a tuning: those made earlier, the room that they leave to texts, and whether a model takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.artifacts.prompt import SOFT, open_prompt
from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.recipe.tune_recipe import TuneRecipe
from mergekit_lfm.runtime.load import Loaded, embeddings, logits, run
from mergekit_lfm.runtime.prompts import behind
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.tune.work import Prepared


def read_earlier(recipe: TuneRecipe, loaded: Loaded) -> tuple[Tensor, ...]:
    """The values of the prompts made earlier. Raises PlanError for those of other kinds and widths."""
    found = list[Tensor]()
    for ref, folder in zip(recipe.earlier, recipe.earlier_prompts, strict=True):
        prompt = open_prompt(folder, ref)
        if prompt.kind not in SOFT:
            raise PlanError(f"{ref} is {prompt.kind}, expected {' or '.join(SOFT)}, which are vectors before texts")
        model: Any = loaded.model
        width = model.get_input_embeddings().embedding_dim
        if prompt.width != width:
            raise PlanError(
                f"{ref} has virtual tokens of {prompt.width} numbers, {recipe.model} takes {width}; give a prompt of "
                "this model"
            )
        found.append(prompt.read().float())
    return tuple(found)


def leave_room(recipe: TuneRecipe, loaded: Loaded, earlier: tuple[Tensor, ...]) -> Loaded:
    """The loaded model with the virtual tokens of the recipe counted. Raises PlanError for a window beyond the rest."""
    if recipe.declaration.makes != "prompt":
        return loaded
    count = int(recipe.settings["tokens"] or 0)
    if recipe.declaration.earlier == "before":
        count += sum(map(len, earlier))
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


def check_prompt(recipe: TuneRecipe, prepared: Prepared) -> None:
    """Raise PlanError if the model does not run with a prompt, or sees nothing of it."""
    if recipe.declaration.makes != "prompt":
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
