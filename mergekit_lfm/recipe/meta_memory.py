"""The memory that a step of a meta-learning needs, estimated from a model's config, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.recipe.meta_recipe import MetaRecipe

FLOAT = 4  # bytes of a number: models compute in float32
WINDOW = 128  # tokens of an example, where the recipe does not limit them
WIDTHS, BLOCKS, SCORES = 12, 4, 3  # of a layer: hidden and MLP widths for each token, and tables of attention
STEP = 9  # numbers of a learned step for each number of the model and of the network's memory
GRAPH = 3  # a pass and its slope as torch.func keeps them, to be derived again, in passes


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a step. model: parameters, their slopes and the optimizer's moments.

    inner: of adapting, for all tasks at once. cure: what lessens it, in words.
    """

    model: int
    inner: int
    tasks: int
    cure: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.inner


def estimate_need(recipe: MetaRecipe, config: Mapping[str, Any], numbers: int) -> Need | None:
    """The need of a recipe for a model with so many numbers; None for a config without the sizes of a transformer.

    Second-order algorithms hold the activations and the parameters of every inner step until the outer slope is there,
    first-order ones those of one pass at a time.
    """
    text = config.get("text_config")
    example = bytes_of_example(recipe, text if isinstance(text, Mapping) else config)
    if example is None:
        return None
    row, (steps, _), ways = recipe.row, recipe.inner, recipe.ways or 1
    support, query = (count * ways * example for count in (recipe.shots, recipe.queries))
    weights = FLOAT * numbers
    if not row.adapts:
        task = support + query
    elif row.learns_steps:
        kept = STEP * int(recipe.own_settings["hidden"] or 0) + 3
        task = max(GRAPH * support, query) + steps * kept * weights
    elif row.kind == "reptile":
        task = GRAPH * (support + query) + 3 * weights
    elif row.first_order:
        task = max(GRAPH * support, query) + 3 * weights
    elif row.head_only or row.named:
        task = (1 + steps) * support + query
    else:
        task = steps * (GRAPH * support + 2 * weights) + query
    moments = 2 if recipe.options.optimizer == "adamw" else 0
    tasks = math.ceil(recipe.options.batch_size / recipe.options.accumulate)
    tasks = int(recipe.own_settings.get("group_count") or tasks)  # groups go through theirs one after the other
    kept = (2 + moments + int(row.learns_rates) * (2 + moments)) * weights
    return Need(kept, tasks * task, tasks, _cure(recipe, tasks))


def bytes_of_example(recipe: MetaRecipe, config: Mapping[str, Any]) -> int | None:
    """The activations of one example in a pass that will be derived."""

    def size(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    hidden, layers = size("hidden_size", "n_embd", "d_model", "dim"), size("num_hidden_layers", "n_layer", "n_layers")
    heads = size("num_attention_heads", "n_head", "n_heads")
    if hidden is None or layers is None or heads is None:
        return None
    inner = size("intermediate_size", "n_inner", "ffn_dim", "hidden_dim") or 4 * hidden
    side, patch = size("image_size"), size("patch_size")
    limit = size("max_position_embeddings", "n_positions") or WINDOW
    tokens = (side // patch) ** 2 + 1 if side and patch else recipe.window or min(WINDOW, limit)
    layer = tokens * (WIDTHS * hidden + BLOCKS * inner + SCORES * heads * tokens)
    scores = 3 * tokens * (size("vocab_size") or 0) if recipe.task == "lm" else 0
    texts = 2 if recipe.task == "embedding" else 1  # a text and its positive
    return FLOAT * texts * (layers * layer + scores)


def _cure(recipe: MetaRecipe, tasks: int) -> str:
    """The ways to need less."""
    row, ways = recipe.row, list[str]()
    if tasks > 1:
        parts = f"cut the batch into more parts (accumulate: {recipe.options.batch_size})"
        ways.append("set a smaller batch_size" if row.whole else parts)
    if not row.first_order:
        ways.append("choose an algorithm that holds one pass (fomaml, or reptile)")
    if recipe.inner[0] > 1 and (row.learns_steps or not row.first_order):
        ways.append("set fewer inner_steps")
    ways += ["set a smaller hidden"] if row.learns_steps else []
    return ", or ".join([*ways, "train less of the model (method: lora or bitfit)", "give shorter examples (window)"])
