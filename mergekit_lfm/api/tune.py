"""`tune_model`: from a saved model and data to a trained one: a checkpoint, a patch, an adapter, or a prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.api.tune_data import TuneData, read_all
from mergekit_lfm.api.tune_plans import ANSWERS, OPTIONS, Lessons, PlannedTuning, plan_tuning
from mergekit_lfm.api.tune_prompts import check_prompt, leave_room
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
from mergekit_lfm.train.examples import Batches, seed_of
from mergekit_lfm.train.loop import STATE, fit, mean_loss
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.processes import Group, joined
from mergekit_lfm.train.state import METRICS
from mergekit_lfm.train.terms import build_loss
from mergekit_lfm.train.texts import lengthen_for
from mergekit_lfm.tune.heads import normalise_head
from mergekit_lfm.tune.phases import select_parts
from mergekit_lfm.tune.work import Prepared, TuneWork


def tune_model(
    model: StrPath,
    data: StrPath | Sequence[StrPath | Mapping[str, Any]],
    out: StrPath,
    *,
    task: str,
    method: str = "full",
    parameters: Mapping[str, Any] | None = None,
    loss: Mapping[str, float] | None = None,
    dev: StrPath | float | None = None,
    groups: Sequence[Mapping[str, Any]] = (),
    stats: StrPath | None = None,
    train: str | Sequence[str] | None = None,
    phases: Sequence[Mapping[str, Any]] = (),
    held_out: Sequence[str] = (),
    window: int | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    schedule: str = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    accumulate: int = 1,
    evaluate_every: int | None = None,
    patience: int | None = None,
    checkpointing: bool = False,
    autocast: bool = False,
    optimizer: str | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Tuned]:
    """Train a saved model on data by a method, and write what that leaves: a checkpoint, a file, an adapter, a prompt.

    model: a folder, a name on the Hub, or MODEL+ADAPTER; it stays as it is. data: a .jsonl, .txt or .npz file, a folder
    of images, or "package.module:function", which is called for the lines; or several; {path, most, templates, cluster}
    uses `most` examples of one in one time round, writes its lines by templates {prompt, completion}, and names its
    kind of tasks; held_out: kinds that are judged alone. task: "lm", "classification", "embedding", "masked_lm",
    "seq2seq" or "regression". parameters: of the method, as `mergekit-lfm methods` lists them. loss: numbers of added
    terms, such as {"l2sp": 0.1}. dev: a development set, or a share of the data; the state with the least loss on it is
    kept. groups: {match, learning_rate, weight_decay} of parameters by a pattern. stats: the Fisher information that
    `mask` needs. train: patterns such as "*layers.0.*": of these parameters alone is trained what the method trains.
    phases: parts {steps, train} one after the other. steps: by default 200. threads: how many torch uses; the bytes
    depend on it. The rest is as of `Options`.

    A run that was killed goes on from the state in OUT.training, where the metrics stay, too. If `out` holds the result
    of the same request already, nothing is done. Processes that torchrun has started share each step; the first alone
    writes. The outcome's digest is that of the request. Raises PlanError for settings and data that do not fit, and for
    a loss that is not finite; FormatError for damaged files; ImportError without transformers, or, where it is needed,
    without peft.
    """
    settings = {name: value for name, value in locals().items() if name in TuneRecipe.model_fields}
    recipe = TuneRecipe.parse({"job": "tune", **as_settings(settings)}, label="tune")
    planned = plan_tuning(recipe, expand(out), device=device)
    return tune_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


def as_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a training in Python as a recipe has them; None stands for the default."""
    given = {name: value for name, value in arguments.items() if value is not None}
    data = given["data"]
    entries = [data] if isinstance(data, str | os.PathLike) else [*data]
    given["data"] = [dict(each) if isinstance(each, Mapping) else os.fspath(each) for each in entries]
    given |= {name: os.fspath(value) for name, value in given.items() if isinstance(value, os.PathLike)}
    given |= {name: [*given[name]] for name in ("groups", "phases", "held_out") if name in given}
    return given | {name: dict(given[name]) for name in ("parameters", "loss") if name in given}


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
        return Outcome(
            out, known_result(planned), request.digest, True, warn_of(planned.notices), time.monotonic() - started
        )
    check_training(planned.training)
    with set_threads(threads):
        tuned, findings = _tune(planned, progress)
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(out, tuned, request.digest, False, warnings, time.monotonic() - started)


def known_result(planned: PlannedTuning) -> Tuned:
    """The result that an earlier run has left."""
    makes = planned.recipe.declaration.makes
    facts = (
        OPTIONS[makes](planned.out)["result"] if makes in OPTIONS else result_of(planned.out, planned.answer.lock_file)
    )
    return Tuned(**facts)


def check_training(folder: Path) -> None:
    """Raise PlanError if the folder for the state holds something else."""
    ours = {STATE, METRICS, ANSWERS}
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PlanError(f"{folder} is in the way of the training's state; move it away")
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise PlanError(f"{folder} holds {others[0]}, which is not the state of a training; move it away")


class _Ready(NamedTuple):
    """A model that is ready to be trained, the checkpoint's names of its parameters, its data, and its size."""

    loaded: Loaded
    prepared: Prepared
    subject: Subject
    data: TuneData
    size: int


def _make_ready(planned: PlannedTuning, data: TuneData | None = None) -> _Ready:
    """Load the model and the data, and check that they go together with the method. data: if they were read before."""
    recipe, method, options = planned.recipe, planned.recipe.declaration, planned.recipe.options
    loaded = load_model(planned.source, method.loads or recipe.task, device=planned.device)
    loaded = replace(loaded, task=recipe.task)
    config: Any = loaded.model.config
    if getattr(config, "is_encoder_decoder", False) and recipe.task != "seq2seq":
        raise PlanError(
            f"{recipe.model} is an encoder with a decoder, which is tuned by the task seq2seq alone; choose that, or "
            "give a model without a decoder"
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
        prepared = select_parts(method.prepare(work), recipe.parts, method.name)
    if "r4f" in recipe.loss:
        prepared = normalise_head(prepared, work, method.name)
    check_places(prepared, subject, planned.source)
    check_adapter(planned, prepared)
    check_prompt(recipe, prepared)
    if data is None:
        data = read_all(leave_room(recipe, loaded, prepared.virtual), planned, fits=recipe.labels_fit)
    else:
        lengthen_for(loaded, [data.examples])  # which sets the token of padding in the model's config
    decay = max([options.weight_decay, *(group.weight_decay or 0.0 for group in options.groups)])
    if decay and not prepared.decays:
        raise PlanError(
            f"weight_decay is {decay}, and {method.name} trains parts of tensors, which would decay as "
            "a whole; leave it out"
        )
    return _Ready(replace(loaded, model=prepared.model), prepared, subject, data, size)


def _tune(planned: PlannedTuning, progress: Progress) -> tuple[Tuned, list[str]]:
    """Train, and write the result; also findings."""
    ready, training = _make_ready(planned), planned.training
    try:
        training.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{planned.out} cannot be written ({reason(error)}); choose another output") from None
    with joined(planned.device) as group, writing_state(training, group):
        if group.count > 1 and planned.recipe.compares_batches:
            raise PlanError("the loss is about all examples of a batch at once; start one process")
        data = ready.data
        if planned.is_taught_before:
            del ready  # so that no two models are in memory at a time
        lessons = planned.learn(data.examples, progress)
        if planned.is_taught_before:
            ready = _make_ready(planned, data)
        return _train(planned, ready, lessons, group, SILENCE if group.rank else progress)


def _train(
    planned: PlannedTuning, ready: _Ready, lessons: Lessons | None, group: Group, progress: Progress
) -> tuple[Tuned, list[str]]:
    """Train what is ready, and write the result; also findings."""
    recipe, options, training = planned.recipe, planned.recipe.options, planned.training
    loaded, prepared, subject, data, size = ready
    start = {name: x.detach().clone() for name, x in prepared.model.named_parameters() if x.requires_grad}
    trained = sum(x.numel() for x in start.values()) if prepared.count is None else prepared.count
    examples: Batches = data.examples
    base = None
    if lessons is not None:
        examples, base = lessons.begin(loaded, data.examples)
    loss = build_loss(recipe.task, recipe.loss, start if "l2sp" in recipe.loss else {}, base)
    judge = partial(mean_loss, prepared.model, loss=LOSSES[recipe.task], options=options)
    before = {name: judge(each) for name, each in data.held_out.items()}
    with progress.by_step(" steps", recipe.VERB) as report:
        history = fit(
            prepared.model,
            examples,
            loss if prepared.loss is None else prepared.loss(loss),
            replace(options, groups=(*options.groups, *prepared.groups(options.learning_rate))),
            dev=data.dev,
            hooks=prepared.hooks,
            place=training,
            request=planned.answer.digest,
            tell=lambda done, whole, line: report(done, whole, _facts(line, examples)),
        )
    held_out = {name: {"before": loss, "after": judge(data.held_out[name])} for name, loss in before.items()}
    reached = (history.loss, history.best, history.best_step)
    makes = recipe.declaration.makes
    facts = {**prepared.facts(), **({} if lessons is None else lessons.end(loaded))}
    tuned = Tuned(makes, history.steps, trained, size, *reached, facts, held_out)
    if group.rank:
        return tuned, []
    findings = write_result(planned, prepared, subject, tuned, {} if lessons is None else lessons.documents)
    (training / STATE).unlink(missing_ok=True)
    if lessons is not None:
        lessons.clear()
    return tuned, findings


def _facts(line: Mapping[str, Any], examples: Batches) -> str:
    """The loss of a step and its pace, in words."""
    unit = "tokens" if any(name.endswith("input_ids") for name in examples.pad) else "examples"
    return f"loss {line['loss']:.4g}, {line['per_second']:,.0f} {unit}/s"


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
def writing_state(folder: Path, group: Group) -> Iterator[None]:
    """Lock the folder for the first process; remove it afterwards if it is empty, as when nothing was saved."""
    if group.rank:
        yield
        return
    try:
        with lock_folder(folder):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()
