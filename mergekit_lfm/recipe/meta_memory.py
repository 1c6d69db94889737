"""The memory that a step of a meta-learning needs, estimated from a model's config, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.recipe.meta_recipe import MetaRecipe
from mergekit_lfm.recipe.meta_teachers import TeachersRecipe

FLOAT = 4  # bytes of a number: models compute in float32
WINDOW = 128  # tokens of an example, where the recipe does not limit them
WIDTHS, BLOCKS, SCORES = 12, 4, 3  # of a layer: hidden and MLP widths for each token, and tables of attention
STEP = 9  # numbers of a learned step for each number of the model and of the network's memory
GRAPH = 3  # a pass and its slope as torch.func keeps them, to be derived again, in passes


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a step. model: parameters, slopes and the optimizer's moments; teachers, and the passes of their images.

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

    def check(self, budget: int) -> None:
        """Raise PlanError, with the way out, if a step needs more than these bytes."""
        if self.total > budget:
            whole, inner, most = (format_size(size) for size in (self.total, self.inner, budget))
            raise PlanError(
                f"a step needs some {whole} of memory, {inner} of it for the inner steps of {self.tasks} tasks at "
                f"once; the budget is {most}. To need less, {self.cure}"
            )

    def __str__(self) -> str:
        """The need in words."""
        return f"some {format_size(self.total)}, {format_size(self.inner)} of it for {self.tasks} tasks at once"


def estimate_need(recipe: MetaRecipe, config: Mapping[str, Any], numbers: int) -> Need | None:
    """The need of a recipe for a model with so many numbers; None for a config without the sizes of a transformer.

    Second-order algorithms hold the activations and the parameters of every inner step until the outer slope is there,
    first-order ones those of one pass at a time.
    """
    text = config.get("text_config")
    example = bytes_of_example(text if isinstance(text, Mapping) else config, recipe.task, recipe.window)
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


def estimate_need_of_images(
    recipe: TeachersRecipe, classes: int, models: Sequence[tuple[Mapping[str, Any], int]]
) -> Need | None:
    """The need of a recipe whose episodes are images of teachers, of so many classes each.

    models: the config and how many numbers of each model; the first one learns, second-order. None for a config without
    the sizes of a transformer. Passes of all images through their teachers are held until the step ends, half of their
    activations, as teachers are not trained; black boxes give no gradient, and are asked in parts.
    """
    (config, numbers), *teachers = models
    example, seen = bytes_of_example(config), [bytes_of_example(own) for own, _ in teachers]
    if example is None or None in seen:
        return None
    weights, steps = FLOAT * numbers, recipe.inner_steps
    task = steps * (GRAPH * recipe.shots * classes * example + 2 * weights) + recipe.queries * classes * example
    images = sum(recipe.count * classes * (each or 0) // 2 for each in seen) if recipe.algorithm == "purer" else 0
    kept = 4 * weights + sum(FLOAT * own for _, own in teachers)
    cure = f"set a smaller batch_size, or fewer {'images, ' if images else ''}shots, queries or inner_steps"
    return Need(kept + images, recipe.batch_size * task, recipe.batch_size, cure)


def bytes_of_example(config: Mapping[str, Any], task: str = "classification", window: int | None = None) -> int | None:
    """The activations of one example in a pass that will be derived. window: the most tokens of a text."""

    def size(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    hidden, layers = size("hidden_size", "n_embd", "d_model", "dim"), size("num_hidden_layers", "n_layer", "n_layers")
    heads = size("num_attention_heads", "n_head", "n_heads")
    if hidden is None or layers is None or heads is None:
        return None
    inner = size("intermediate_size", "n_inner", "ffn_dim", "hidden_dim") or 4 * hidden
    side, patch = size("image_size"), size("patch_size")
    limit = size("max_position_embeddings", "n_positions") or WINDOW
    tokens = (side // patch) ** 2 + 1 if side and patch else window or min(WINDOW, limit)
    layer = tokens * (WIDTHS * hidden + BLOCKS * inner + SCORES * heads * tokens)
    scores = 3 * tokens * (size("vocab_size") or 0) if task == "lm" else 0
    texts = 2 if task == "embedding" else 1  # a text and its positive
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
