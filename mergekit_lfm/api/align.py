"""`align_models`: from two saved models to a transform file; `check_table`: a test of a model's table of symmetries."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergekit_lfm.align.find import find_differences, find_transform
from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.repeats import is_repeated
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.artifacts.transform import DIFFERENT, SAME, Transform, open_transform, read_transform_info
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.replace import check_folder
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.files import paths_in
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import digest_file
from mergekit_lfm.store.places import OVERWRITE, check_file
from mergekit_lfm.store.tensors import ITEMSIZE
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.rewritten import Rewritten

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.align.check import Report
    from mergekit_lfm.arch import Symmetries

CHANGES = "the method changes them on purpose"


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A rewritten model in a folder, and how far its outputs are from the original's, relative to their range.

    difference, tolerance, same: None if the models could not be run. same: True as well for a method that changes
    outputs on purpose. already_there: an earlier run had written it.
    """

    path: Path
    difference: float | None = None
    tolerance: float | None = None
    same: bool | None = None
    already_there: bool = False


@dataclass(frozen=True)
class Aligned(Outcome[Transform]):
    """The outcome of an alignment; its result is the transform. saved: the rewritten model, None without `save`."""

    saved: SavedModel | None = None


@dataclass(frozen=True, slots=True)
class CheckedTable:
    """A table of symmetries, and the findings of running the model with random elements of its groups."""

    symmetries: Symmetries
    report: Report


def align_models(
    model: StrPath,
    to: StrPath,
    out: StrPath | None = None,
    *,
    method: str = "weight_matching",
    stats: StrPath | None = None,
    initial: StrPath | None = None,
    order: Iterable[str] | None = None,
    device: str = "cpu",
    save: StrPath | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **parameters: Any,
) -> Aligned:
    """Find the transform that brings a saved model near another, and write it to a file that merges apply.

    out: the transform file, None for none. stats: the file of cross moments of both models that
    `collect_stats("cross", ...)` writes. initial: a transform file to start from. order: the groups that a sweep
    visits. device: where matrices are multiplied. save: a folder for the rewritten model. parameters: those of the
    method, as in a recipe's `align`. If `out` holds the transform of the same request already, nothing is written.
    `find_transform` does the same for tensors and tables in memory.

    The model and the rewritten one run, and `result.info.outputs` says whether their outputs are the same; or why they
    did not run: without a config, without transformers, or if they take more than the default memory, unless `save`
    asks for it. The outcome's digest is that of the transform's content. Raises PlanError for impossible requests and
    outputs that are in the way, FormatError for NaN or infinity in a model; ImportError if `save` needs transformers.
    """
    started = time.monotonic()
    order = None if order is None else list(order)
    source, target = model_folder(model), model_folder(to)
    file, folder = (None if path is None else expand(path) for path in (out, save))
    by_stats, start = (None if path is None else expand(path) for path in (stats, initial))
    how = {"statistics": stats is not None, "initial": initial is not None, "order": order, "device": device}
    differences = partial(_find_differences, (source, target), method, parameters, how)
    there = is_repeated(file, differences, overwrite=overwrite)
    inputs = [path for path in (source, target, by_stats, start) if path is not None]
    _check_places(inputs, file, folder, replace=overwrite or there)
    known = there and file is not None and not _depends_on_more(method, stats, initial)
    if known and file is not None:
        transform = open_transform(file)
    else:
        with progress.by_tick(" groups", "aligning") as tick:
            options = {"order": order, "progress": tick, "device": device, **parameters}
            transform = _find(source, target, method, by_stats, start, **options)
    difference = tolerance = saved = None
    if not known or folder is not None:
        outputs, difference, tolerance = _compare(source, transform, asked=folder is not None)
        transform = replace(transform, info=replace(transform.info, outputs=outputs))
    if not known:
        there = file is not None and _write(transform, file, there=there, overwrite=overwrite)
    digest = None if file is None else open_checkpoint(file).content
    if folder is not None and file is not None:
        written = _save(source, file, folder, overwrite, progress)
        there = there and written
        same = None if difference is None else transform.info.outputs != DIFFERENT
        saved = SavedModel(folder, difference, tolerance, same, written)
    wrong = f"{file or 'the transform'}: it changes the outputs of {source}"
    warnings = warn_of([wrong] if transform.info.outputs == DIFFERENT else [])
    return Aligned(file, transform, digest, there, warnings, time.monotonic() - started, saved)


def _find(source: Path, to: Path, method: str, stats: Path | None, initial: Path | None, **options: Any) -> Transform:
    """The transform, with the statistics and the start in these files."""
    statistics = None if stats is None else open_statistics(stats)
    start = None if initial is None else open_transform(initial)
    return find_transform(source, to, method, statistics=statistics, initial=start, **options)


def _find_differences(
    models: tuple[Path, Path], method: str, parameters: Mapping[str, Any], how: Mapping[str, Any], file: Path
) -> list[str]:
    """The parts of a transform file's header that another request made."""
    _, facts = read_transform_info(file)
    source, to = map(open_checkpoint, models)
    return find_differences(facts, source, to, method, parameters, **how)


def _depends_on_more(method: str, stats: StrPath | None, initial: StrPath | None) -> bool:
    """True if a transform depends on more than its header tells: a start, statistics, or whether there were any."""
    declared = ALIGN_METHODS[method]
    return initial is not None or stats is not None or (declared.statistics == "optional" and not declared.idle)


def _write(transform: Transform, file: Path, *, there: bool, overwrite: bool) -> bool:
    """Write the transform file; True if it is there already, to the byte. there: its header is of this request."""
    if there:
        _, facts = read_transform_info(file)  # the request does not say whether models ran
        with TemporaryDirectory() as folder:
            same = replace(transform, info=replace(transform.info, outputs=facts.outputs))
            same.save(Path(folder) / "new.safetensors")
            if digest_file(Path(folder) / "new.safetensors") == digest_file(file):
                return True
        if not overwrite:
            raise PlanError(
                "{place} exists and is {found}; {cure}",
                place=file,
                found="from other statistics, or from another start",
                cure=OVERWRITE,
            )
    transform.save(file)
    return False


def _check_places(inputs: list[Path], file: Path | None, folder: Path | None, *, replace: bool) -> None:
    """Raise an error, before the work, if an output must not be written, or the rewritten model could not be run."""
    places = [place for path in inputs for place in paths_in(path)]
    if file is not None:
        check_file(file, places, overwrite=replace)
    if folder is None:
        return
    if file is None:
        raise PlanError("save applies a transform file, which `out` names; give `out`, too")
    if file.resolve().is_relative_to(folder.resolve()):
        raise PlanError(f"the transform {file} would lie in the folder {folder}, which is written, too; choose another")
    check_folder(folder, {str(path): path for path in places}, overwrite=replace)
    model, to = inputs[:2]
    source, other = open_model(model), open_model(to)
    if wider := next((name for name in source if name in other and source[name].shape != other[name].shape), None):
        raise PlanError(
            f"{model} has {source[wider]}, {to} {list(other[wider].shape)}: its config would not fit the rewritten "
            "model, so it cannot be saved by itself; merge it with `align: FILE` in a recipe"
        )
    if "model_type" in source.config:
        from mergekit_lfm.runtime.load import import_transformers

        import_transformers()


def _compare(model: Path, transform: Transform, *, asked: bool) -> tuple[str, float | None, float | None]:
    """The `outputs` of a transform's facts; how much the outputs differ, and how much of it rounding explains.

    asked: run them if it is possible at all, and raise the errors.
    """
    source = open_model(model)
    rewritten = Rewritten(source, transform, {})
    if why := _find_obstacle(source, rewritten, transform, asked):
        return f"not compared: {why}", None, None
    from mergekit_lfm.judge.same import compare_outputs

    try:
        difference, tolerance = compare_outputs(source, rewritten, transform)
    except (FormatError, ImportError, PlanError) as error:
        if asked:
            raise
        first, *_ = str(error).splitlines()
        return f"not compared: {first}", None, None
    outputs = SAME if difference <= tolerance else DIFFERENT
    return outputs if transform.info.exact else f"not compared: {CHANGES}", difference, tolerance


def _find_obstacle(source: Checkpoint, rewritten: Checkpoint, transform: Transform, asked: bool) -> str:
    """Why the model and the rewritten one are not run; "" if they are."""
    if "model_type" not in source.config:
        return (
            "running it needs a config.json with a model_type. A skip connection or a grouped convolution, which the "
            "tensors do not show, would change the outputs"
        )
    if asked:
        return ""
    if not transform.info.exact:
        return CHANGES
    needed = 2 * ITEMSIZE["float32"] * sum(spec.numel for spec in source.values())
    if needed > (most := default_memory()):
        return f"both models take {format_size(needed)}, more than {format_size(most)}; --save runs them all the same"
    if any(rewritten[name].shape != spec.shape for name, spec in source.items()):
        return "the model's config does not fit the rewritten tensors"
    return ""


def _save(model: Path, file: Path, folder: Path, overwrite: bool, progress: Progress) -> bool:
    """Write the rewritten model through a merge of it alone; True if an earlier run had written it."""
    entry = {"model": str(model), "align": str(file)}
    plan = make_plan(Recipe.parse({"merge_method": "passthrough", "models": [entry]}))
    return execute(plan, folder, overwrite=overwrite, progress=progress, doing="writing").already_there


def check_table(model: StrPath, *, progress: Progress = SILENCE) -> Outcome[CheckedTable]:
    """Check the table of symmetries of a saved model, by running the model with random elements of every group.

    `result.report.ok` is True if the outputs stay the same where the table says so, and change where it says so. Raises
    PlanError if the model's config does not name its class, ImportError if transformers is not installed.
    """
    from mergekit_lfm.align.check import check_symmetries
    from mergekit_lfm.arch import find_symmetries
    from mergekit_lfm.runtime.load import load_as_saved
    from mergekit_lfm.runtime.probe import all_outputs, probe

    started, folder = time.monotonic(), model_folder(model)
    checkpoint = open_model(folder)
    if not checkpoint.config.get("architectures"):
        lack = "whose config.json has no `architectures`" if checkpoint.config else "without a config.json"
        raise PlanError(
            f"--check runs the model: found {folder} {lack}, expected a folder with a config.json that names the "
            "model's class under `architectures`. Save the model with transformers"
        )
    symmetries = find_symmetries(checkpoint)
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}

    def run(changed: Mapping[str, Tensor]) -> Tensor:
        loaded = load_as_saved(folder, changed)
        return all_outputs(loaded, probe(loaded))

    with progress.by_count(" runs", "checking") as count:
        report = check_symmetries(tensors, symmetries, run, progress=count)
    return Outcome(None, CheckedTable(symmetries, report), seconds=time.monotonic() - started)
