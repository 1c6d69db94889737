"""`tune_model`: from a saved model and data to a trained one: a checkpoint, a patch, an adapter, or a prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.tune_plans import OPTIONS, PlannedTuning, plan_tuning
from mergekit_lfm.api.tune_prompts import check_lengths, check_prompt, leave_room
from mergekit_lfm.api.tune_results import Tuned, check_adapter, check_places, write_result
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.request import result_of
from mergekit_lfm.recipe.tune_recipe import TuneRecipe
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.subject import Subject, make_subject
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import check_apart
from mergekit_lfm.train.examples import Examples, join, seed_of
from mergekit_lfm.train.loop import STATE, fit
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.state import METRICS
from mergekit_lfm.train.texts import check_labels, lengthen_by_no_ending, read_examples
from mergekit_lfm.tune.work import TuneWork


def tune_model(
    model: StrPath,
    data: StrPath | Sequence[StrPath | Mapping[str, Any]],
    out: StrPath,
    *,
    task: str,
    method: str = "full",
    parameters: Mapping[str, Any] | None = None,
    dev: StrPath | None = None,
    stats: StrPath | None = None,
    window: int | None = None,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float | None = None,
    schedule: str = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    accumulate: int = 1,
    evaluate_every: int | None = None,
    patience: int | None = None,
    checkpointing: bool = False,
    autocast: bool = False,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Tuned]:
    """Train a saved model on data by a method, and write what that leaves: a checkpoint, a file, an adapter, a prompt.

    model: a folder, a name on the Hub, or MODEL+ADAPTER; it stays as it is. data: a .jsonl, .txt or .npz file, or
    several; an entry {path, most} uses `most` examples of a file in one time round. task: "lm", "classification" or
    "embedding". parameters: of the method, as `mergekit-lfm methods` lists them. dev: a development set; the state with
    the least loss on it is kept. stats: the file of Fisher information that the method `mask` needs. threads: how many
    torch uses while this runs; the bytes depend on their number. The other settings are explained at `Options`.

    A run that was killed goes on from the state in OUT.training, where the metrics stay, too. If `out` holds the result
    of the same request already, nothing is done. The outcome's digest is that of the request. Raises PlanError for
    settings and data that do not fit, and for a loss that is not finite; FormatError for damaged files; ImportError
    without transformers, or for an adapter without peft.
    """
    recipe: dict[str, Any] = {"job": "tune", "model": os.fspath(model), "task": task, "method": method}
    entries = [data] if isinstance(data, str | os.PathLike) else [*data]
    recipe["data"] = [dict(each) if isinstance(each, Mapping) else os.fspath(each) for each in entries]
    recipe |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "schedule": schedule}
    recipe |= {"warmup": warmup, "weight_decay": weight_decay, "clip": clip, "accumulate": accumulate, "seed": seed}
    recipe |= {"evaluate_every": evaluate_every, "patience": patience, "checkpointing": checkpointing, "window": window}
    recipe |= {"autocast": autocast}
    recipe |= {"parameters": dict(parameters or {})}
    recipe |= {key: None if path is None else os.fspath(path) for key, path in (("dev", dev), ("stats", stats))}
    planned = plan_tuning(TuneRecipe.parse(recipe, label="tune"), expand(out), device=device)
    return tune_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


def tune_planned(
    planned: PlannedTuning, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Tuned]:
    """Carry a planned tuning out; as `tune_model` does."""
    started = time.monotonic()
    out, request = planned.out, planned.answer
    _ = request.digest  # of the inputs as they are before the work
    check_apart(out, {file.ref: file.path for file in planned.recipe.named_files})
    there = planned.request.is_answered(out, overwrite=overwrite)
    if there:
        return Outcome(out, _known(planned), request.digest, True, warn_of(planned.notices), time.monotonic() - started)
    _check_training(planned.training)
    with _threads(threads):
        tuned, findings = _tune(planned, progress)
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(out, tuned, request.digest, False, warnings, time.monotonic() - started)


def _known(planned: PlannedTuning) -> Tuned:
    """The result that an earlier run has left."""
    makes = planned.recipe.declaration.makes
    facts = (
        OPTIONS[makes](planned.out)["result"] if makes in OPTIONS else result_of(planned.out, planned.answer.lock_file)
    )
    return Tuned(**facts)


def _check_training(folder: Path) -> None:
    """Raise PlanError if the folder for the state holds something else."""
    ours = {STATE, METRICS}
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PlanError(f"{folder} is in the way of the training's state; move it away")
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise PlanError(f"{folder} holds {others[0]}, which is not the state of a training; move it away")


def _tune(planned: PlannedTuning, progress: Progress) -> tuple[Tuned, list[str]]:
    """Train, and write the result; also findings."""
    recipe, request = planned.recipe, planned.answer
    options, method = recipe.options, recipe.declaration
    loaded = load_model(planned.source, recipe.task, device=planned.device)
    config: Any = loaded.model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(
            f"{recipe.model} is an encoder with a decoder, expected a model without; such are not tuned here"
        )
    subject = make_subject(loaded.model, planned.source)
    size = sum(x.numel() for x in loaded.model.parameters())
    with torch.random.fork_rng([loaded.model.device] if planned.device.startswith("cuda") else []):
        torch.manual_seed(seed_of(options.seed, "start"))
        fisher = None if recipe.statistics is None else _fisher(recipe.statistics, subject)
        files = tuple(file.path for file in recipe.named_files)
        facts = (recipe.found.model, fisher, files, subject.digest, recipe.tasks, loaded.tokenizer)
        work = TuneWork(loaded.model, recipe.task, recipe.settings, options.steps, *facts)
        _ = subject.names  # as they are before the method changes them
        prepared = method.prepare(work)
    check_places(prepared, subject, planned.source)
    check_adapter(planned, prepared)
    check_prompt(recipe, prepared)
    examples, dev = _read_all(leave_room(recipe, loaded, prepared.virtual), recipe)
    if options.weight_decay and not prepared.decays:
        raise PlanError(
            f"weight_decay is {options.weight_decay}, and {method.name} trains parts of tensors, which would decay as "
            "a whole; leave it out"
        )
    every, training = sum(x.numel() for x in prepared.model.parameters() if x.requires_grad), planned.training
    trained = every if prepared.count is None else prepared.count
    try:
        training.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{planned.out} cannot be written ({reason(error)}); choose another output") from None
    with _without_empty(training), lock_folder(training), progress.by_count(" steps", "tuning") as count:
        history = fit(
            prepared.model,
            examples,
            LOSSES[recipe.task] if prepared.loss is None else prepared.loss(LOSSES[recipe.task]),
            options,
            dev=dev,
            hooks=prepared.hooks,
            place=training,
            request=request.digest,
            tell=lambda done, whole, _: count(done, whole),
        )
        found = (history.steps, trained, size, history.loss, history.best, history.best_step)
        tuned = Tuned(method.makes, *found, prepared.facts())
        findings = write_result(planned, prepared, subject, tuned)
        (training / STATE).unlink(missing_ok=True)
    return tuned, findings


def _read(path: Path, loaded: Loaded, recipe: TuneRecipe) -> Examples:
    examples = read_examples(path, loaded, window=recipe.window)
    if recipe.task == "classification":
        config: Any = loaded.model.config
        check_labels(examples, getattr(config, "num_labels", None), path)
    check_lengths(examples, loaded, path)
    return examples


def _read_all(loaded: Loaded, recipe: TuneRecipe) -> tuple[Examples, Examples | None]:
    """The data, and the development set."""
    sets = [_read(file.path, loaded, recipe) for file in recipe.files]
    dev = [] if recipe.dev_file is None else [_read(recipe.dev_file.path, loaded, recipe)]
    files = [*recipe.files, *([recipe.dev_file] if recipe.dev_file else [])]
    for file, each in zip(files, [*sets, *dev], strict=True):
        if each.items[0].keys() != sets[0].items[0].keys():
            found, expected = (", ".join(some.items[0]) for some in (each, sets[0]))
            raise PlanError(f"{file.ref}: found {found}; expected {expected}, as in {files[0].ref}")
    if recipe.task == "embedding" and sum(map(len, sets)) < 2:
        raise PlanError(f"{files[0].ref}: found one pair, expected two or more, which are compared. Add some")
    if recipe.task == "classification" and "input_ids" in sets[0].pad:
        config: Any = loaded.model.config
        padding = lengthen_by_no_ending([*sets, *dev])
        config.get_text_config().pad_token_id = padding  # by which a decoder finds a row's last token
        sets, dev = ([replace(each, pad={"input_ids": padding}) for each in some] for some in (sets, dev))
    if recipe.declaration.tasks:
        numbered = [_of_task(each, number) for number, each in enumerate([*sets, *dev])]
        sets, dev = numbered[: len(sets)], numbered[len(sets) :]
    return join(sets, [file.most for file in recipe.files]), dev[0] if dev else None


def _of_task(examples: Examples, number: int) -> Examples:
    """The examples with the number of their task."""
    return replace(examples, items=[{**item, "task_ids": torch.tensor(number)} for item in examples.items])


def _fisher(path: Path, subject: Subject) -> dict[str, Tensor]:
    """The Fisher information of each parameter that a file covers. Raises FormatError for a file of another model."""
    statistics = open_statistics(path)
    if statistics.info.kind != "fisher" or statistics.info.models != (subject.digest,):
        raise FormatError(
            f"{path} holds no Fisher information of this model; collect it with `mergekit-lfm stats fisher`"
        )
    found = {name: statistics.entry_of(tensor) for name, tensor in subject.tensors.items()}
    shapes = dict(subject.module.named_parameters())
    return {
        name: statistics.tensors.read(entry).view(shapes[name].shape)
        for name, entry in found.items()
        if entry is not None and name in shapes
    }


@contextmanager
def _without_empty(folder: Path) -> Iterator[None]:
    """Remove the folder afterwards if it is empty, as when nothing was worth to be saved."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads meanwhile; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
