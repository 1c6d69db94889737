"""The data of a tuning: to train on, to choose the best state by, and clusters that are held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mergekit_lfm.api.tune_plans import PlannedTuning
from mergekit_lfm.api.tune_prompts import check_lengths
from mergekit_lfm.distill.spans import with_places, without_places
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.tune_data import DataFile
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.runtime.load import Loaded, tokenizer_for_texts
from mergekit_lfm.train.examples import Examples, join, split
from mergekit_lfm.train.terms import check_language, with_reference
from mergekit_lfm.train.texts import check_labels, lengthen_for, read_examples


class TuneData(NamedTuple):
    """The examples to train on, the development set, and the examples of clusters that are held out."""

    examples: Examples
    dev: Examples | None
    held_out: dict[str, Examples]


def read_all(loaded: Loaded, planned: PlannedTuning, *, fits: bool = True) -> TuneData:
    """The data of all files. fits: whether their labels have to be classes of the model.

    Raises PlanError for files that do not fit each other, FormatError for damaged ones.
    """
    recipe = planned.recipe
    sets = [read_file(file, loaded, planned, fits=fits) for file in recipe.files]
    dev = [] if recipe.dev_file is None else [read_file(recipe.dev_file, loaded, planned, fits=fits)]
    files = [*recipe.files, *([recipe.dev_file] if recipe.dev_file else [])]
    for file, each in zip(files, [*sets, *dev], strict=True):
        if each.items[0].keys() != sets[0].items[0].keys():
            found, expected = (", ".join(some.items[0]) for some in (each, sets[0]))
            raise PlanError(f"{file.ref}: found {found}; expected {expected}, as in {files[0].ref}")
        if each.rows != sets[0].rows:
            found, expected = (", ".join(f"{k} of {[*v]}" for k, v in some.rows.items()) for some in (each, sets[0]))
            raise PlanError(
                f"{file.ref}: found {found}; expected {expected}, as in {files[0].ref}; give images of one size"
            )
    if recipe.task == "embedding" and sum(map(len, sets)) < 2:
        raise PlanError(f"{files[0].ref}: found one pair, expected two or more, which are compared. Add some")
    longer = lengthen_for(loaded, [*sets, *dev])
    sets, dev = longer[: len(sets)], longer[len(sets) :]
    _check_loss(recipe, loaded, sets[0])
    if "dpo" in recipe.loss:
        size = recipe.options.batch_size
        sets, dev = ([with_reference(loaded.model, each, size) for each in some] for some in (sets, dev))
    if recipe.declaration.tasks:
        numbered = [_of_task(each, number) for number, each in enumerate([*sets, *dev])]
        sets, dev = numbered[: len(sets)], numbered[len(sets) :]
    if not recipe.by_places:
        return _divide(recipe, sets, dev[0] if dev else None)
    tokenizer = tokenizer_for_texts(loaded.tokenizer)
    named = zip(recipe.files, sets, strict=True)
    sets = [with_places(each, planned.path_of(file), tokenizer, file.templates) for file, each in named]
    data = _divide(recipe, sets, dev[0] if dev else None)
    held_out = {name: without_places(each) for name, each in data.held_out.items()}
    return data._replace(dev=None if data.dev is None else without_places(data.dev), held_out=held_out)


def _of_task(examples: Examples, number: int) -> Examples:
    """The examples with the number of their task."""
    return replace(examples, items=[{**item, "task_ids": torch.tensor(number)} for item in examples.items])


def _divide(recipe: TrainingRecipe, sets: list[Examples], dev: Examples | None) -> TuneData:
    """The data sets of the files, by what they are for."""
    named = [*zip(recipe.files, sets, strict=True)]
    held = {name: [each for file, each in named if file.cluster == name] for name in recipe.held_out}
    others = {name: join(each, [None] * len(each)) for name, each in held.items()}
    most = [file.most for file, _ in named if file.cluster not in held]
    trained = [each for file, each in named if file.cluster not in held]
    if recipe.dev_share is not None:
        trained, dev = split(trained, recipe.dev_share, recipe.seed)
    return TuneData(join(trained, most), dev, others)


def read_file(file: DataFile, loaded: Loaded, planned: PlannedTuning, *, fits: bool) -> Examples:
    """The examples of a file. fits: as of `read_all`."""
    recipe, path = planned.recipe, planned.path_of(file)
    options: dict[str, Any] = {"window": recipe.window, "templates": file.templates, "labelled": recipe.is_labelled}
    examples = read_examples(path, loaded, **options)
    if recipe.task == "classification" and recipe.is_labelled and fits:
        config: Any = loaded.model.config
        check_labels(examples, getattr(config, "num_labels", None), path)
    check_lengths(examples, loaded, path)
    return examples


def _check_loss(recipe: TrainingRecipe, loaded: Loaded, examples: Examples) -> None:
    """Raise PlanError for a term of the loss that does not fit the model or the data."""
    if "aux_lm" in recipe.loss:
        check_language(loaded, examples)
    pairs = "rejected_input_ids" in examples.items[0]
    if pairs != ("dpo" in recipe.loss):
        found = f"{recipe.files[0].ref}: found {'chosen and rejected answers' if pairs else 'no rejected answers'}"
        cure = "set the loss dpo (--loss dpo=0.1)" if pairs else 'give {"prompt", "chosen", "rejected"} on each line'
        raise PlanError(
            f"{found}; expected {'the loss dpo' if pairs else 'some for the loss dpo'}. {cure.capitalize()}"
        )
