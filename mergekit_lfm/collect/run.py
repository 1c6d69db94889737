"""Turn a model and data into a statistics file: check the request, prepare, collect and publish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mergekit_lfm.artifacts.statistics import Statistics, StatisticsInfo, open_statistics
from mergekit_lfm.collect.partial import WIDEST_COUNT, WIDEST_NORM, Partial, check_partial_is_ours, clear
from mergekit_lfm.collect.passes import divide, file_bytes, run_passes, sum_bytes
from mergekit_lfm.collect.request import Collector, Statistic, StatisticsRequest
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.machine.resources import allocated_bytes, default_memory, free_space
from mergekit_lfm.machine.sizes import format_size, parse_size
from mergekit_lfm.methods.kinds import Options
from mergekit_lfm.recipe.files import paths_in
from mergekit_lfm.recipe.registry import STATISTIC_METHODS
from mergekit_lfm.recipe.stats import statistic_options
from mergekit_lfm.runtime.batches import Batch, as_batches, digest_of
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.subject import Subject, evaluation_mode, make_subject
from mergekit_lfm.runtime.tasks import TASKS
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.places import check_file, partial_of
from mergekit_lfm.version import __version__
from mergekit_lfm.views.adapted import with_adapters

Model = nn.Module | str | Path | Checkpoint
Task = Literal["lm", "classification", "embedding"]


def collect(
    kind: str,
    model: Model,
    data: str | Path | Iterable[Any],
    out: str | Path,
    *,
    other: Model | None = None,
    task: Task = "classification",
    checkpoint: str | Path | None = None,
    other_checkpoint: str | Path | None = None,
    layers: Sequence[str] = (),
    batch_size: int = 16,
    window: int | None = None,
    max_examples: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    memory: int | str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **parameters: Any,
) -> Statistics:
    """Run the model on the data, write the statistics file `out`, and return it open.

    kind: "gram" for the second moments of the inputs of every linear layer, "cross" for those between the same layers
    of the model and of `other`, "fisher" for the diagonal Fisher information of every parameter. model: a folder of
    transformers, loaded for the task on `device` in `dtype`, or any nn.Module as it is, in evaluation mode. The names
    in the file are those of the folder, or of the `checkpoint` that a module was loaded from, else those of its
    state_dict. data: a file (`read_data`, with batch_size, window, max_examples), or batches (`as_batches`).

    layers: keep only layers (for "fisher" tensors) whose names contain one of these; all without any. memory: bytes (or
    "2GB") for sums; with less there are more passes over the data, and the file is the same. An interrupted run goes on
    from OUT.partial unless resume is False. progress is called with the number of examples done and the total.
    parameters: of the kind. For "fisher" `labels`: "expected" over all that the model may predict, "sampled" from it
    (`samples` draws for each example, by `seed`), or "true" ones of the data; None takes the first that the task has.

    Raises PlanError for a request that cannot be met, FormatError for files that do not fit each other, and for NaN.
    """
    given = statistic_options(kind, parameters)
    method: Collector = STATISTIC_METHODS[kind]
    if (other is not None) != (method.models == 2):
        raise PlanError(f"{kind} takes {'two models' if method.models == 2 else 'one model'}; give that many (`other`)")
    if task not in TASKS:
        raise PlanError(f"found the task {task!r}, expected one of {', '.join(TASKS)}; choose one of these")
    nbytes = default_memory() if memory is None else parse_size(memory)
    options = method.settle(task, given)
    models = [(model, checkpoint), *([(other, other_checkpoint)] if other is not None else [])]
    destination = _destination(Path(out), [path for pair in models for path in pair], data)
    subjects = [_open_model(m, saved_as, task, dtype, device) for m, saved_as in models]
    batches = _batches(data, task, [loaded for _, loaded in subjects], batch_size, window, max_examples)
    request = StatisticsRequest(tuple(s for s, _ in subjects), batches, task, tuple(layers), nbytes, options)
    facts = _known_facts(kind, request)
    if not _already_there(destination, facts, overwrite):
        with evaluation_mode(*(subject.module for subject in request.subjects)):
            _collect(destination, method.start(request), request, facts, resume, progress or (lambda *_: None))
    return open_statistics(destination)


def _destination(out: Path, models: Sequence[Model | None], data: object) -> Path:
    """Where the file goes; its folder is made. Raises PlanError if the file must not go there."""
    inputs = [place for path in (*models, data) if isinstance(path, str | Path) for place in paths_in(path)]
    inputs += [folder for model in models if isinstance(model, Checkpoint) for folder in model.folders]
    check_file(out, inputs, overwrite=True)  # an earlier output is compared with the request before it is replaced
    resolved = out.resolve()
    resolved.parent.mkdir(parents=True, exist_ok=True)
    check_partial_is_ours(resolved)
    return out.absolute()


def _open_model(
    model: Model, saved: str | Path | None, task: str, dtype: str, device: str | None
) -> tuple[Subject, Loaded | None]:
    if isinstance(model, nn.Module):
        return make_subject(model, None if saved is None else open_checkpoint(saved)), None
    if saved is not None:
        raise PlanError(
            f"{model} is a checkpoint itself; `checkpoint` is for modules that were loaded from one. Leave it out"
        )
    source = model if isinstance(model, Checkpoint) else with_adapters(model)
    loaded = load_model(source, task, dtype=dtype, device=device or "cpu")
    return make_subject(loaded.model, loaded.checkpoint), loaded


def _batches(
    data: Any, task: str, opened: Sequence[Loaded | None], batch_size: int, window: int | None, most: int | None
) -> Sequence[Batch]:
    if not isinstance(data, str | Path):
        if window is not None or most is not None:
            raise PlanError("window and max_examples are for data files; these are batches. Cut the batches yourself")
        return as_batches(data)
    loaded = [model for model in opened if model is not None]
    if Path(data).suffix != ".npz":
        _check_tokenizers(loaded)
    positions = min((model.positions for model in loaded if model.positions is not None), default=None)
    tokenizer = loaded[0].tokenizer if loaded else None
    return read_data(
        data, task, tokenizer, window=window, positions=positions, batch_size=batch_size, max_examples=most
    )


def _check_tokenizers(models: Sequence[Loaded]) -> None:
    """Raises PlanError if the models' tokenizers have different vocabularies."""
    known = [model.tokenizer.get_vocab() for model in models if model.tokenizer is not None]
    if any(vocabulary != known[0] for vocabulary in known[1:]):
        folders = " and ".join(str(model.checkpoint.path) for model in models)
        raise PlanError(
            f"{folders} have different tokens in their tokenizers; expected the same, since both models read the same "
            "ids. Take models with one vocabulary, or give batches that both can read"
        )


def _known_facts(kind: str, request: StatisticsRequest) -> StatisticsInfo:
    """The facts known before the model runs."""
    models = [(subject.digest, str(subject.dtype).removeprefix("torch.")) for subject in request.subjects]
    return known_facts(kind, models, request.data, request.task, request.layers, request.options)


def known_facts(
    kind: str,
    models: Sequence[tuple[str, str]],
    batches: Sequence[Batch],
    task: str,
    layers: Sequence[str],
    options: Options,
) -> StatisticsInfo:
    """The facts of a statistics file that are known before the model runs. models: the content and dtype of each."""
    digests, dtypes = zip(*models, strict=True)
    whole = {"task": task, "layers": sorted(layers), "dtype": [*dtypes], **options}
    versions = {"mergekit_lfm": __version__, "torch": torch.__version__}
    return StatisticsInfo(kind, digests, digest_of(batches), whole, sum(map(len, batches)), versions=versions)


def differences(file: Path, facts: StatisticsInfo) -> list[str]:
    """The names of the facts in which a statistics file differs. Raises FormatError for another file."""
    existing, names = open_statistics(file).info, ("kind", "models", "data", "options", "versions")
    return [name for name in names if getattr(existing, name) != getattr(facts, name)]


def _already_there(out: Path, facts: StatisticsInfo, overwrite: bool) -> bool:
    """True if OUT already is the requested file. Raises PlanError if it differs and may not be overwritten."""
    if not out.exists():
        return False
    try:
        differing = differences(out, facts)
    except FormatError:
        differing = ["it is not a complete statistics file"]
    if not differing:
        clear(out)
        return True
    if not overwrite:
        raise PlanError(
            "{place} exists and differs: {found}; {cure}",
            place=out,
            found=", ".join(differing),
            cure="choose another output, or overwrite it",
        )
    return False


def _collect(
    out: Path, statistic: Statistic, request: StatisticsRequest, facts: StatisticsInfo, resume: bool, report: Count
) -> None:
    unknown = dict.fromkeys(statistic.units, WIDEST_COUNT)
    facts = replace(facts, layers=statistic.layers(unknown), skipped=statistic.skipped, norm=WIDEST_NORM)
    passes = divide(statistic, request.memory, {})
    _check_disk(out, statistic, passes)
    with Partial(out, facts, statistic.units, resume) as partial:
        run_passes(statistic, request, divide(statistic, request.memory, partial.done), partial, Pauses(), report)
        counts = {unit: partial.done[unit]["count"] for unit in statistic.units}
        norm = statistic.norm(math.fsum(partial.done[unit]["squares"] for unit in statistic.units))
        layers = statistic.layers(counts)
        partial.publish(replace(facts, layers=layers, norm=norm))


def _check_disk(out: Path, statistic: Statistic, passes: list[list[str]]) -> None:
    """Raises PlanError if the disk cannot hold the file and a pass's sums, twice while they are replaced."""
    sums = max(sum(sum_bytes(statistic.units[unit]) for unit in units) for units in passes)
    needed = sum(map(file_bytes, statistic.units.values())) + 2 * sums
    free = free_space(out) + allocated_bytes(partial_of(out))
    if needed > free:
        raise PlanError(
            f"{out.parent} has {format_size(free)} free, expected {format_size(needed)} for the file and its temporary "
            "sums. Free some, choose another folder, or collect fewer layers at a time (`layers`)"
        )
