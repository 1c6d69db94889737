"""`apply_patches` and `undo_patches`: patches applied to saved models, and undone to the byte.

Both are merges of one model, read through a view: with the writer's safety, its lock, and the same files. The kernel
copies the tensors that do not change. The undo file is a patch, too: the changed tensors as they were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, as_bytes, expand, model_folder
from mergekit_lfm.api.efficacy import (
    check_efficacy,
    check_runs,
    facts_of,
    is_enough,
    load_for_texts,
    note_scores,
    score,
)
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange, open_patch, read_patch_info
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.identity import content_digest
from mergekit_lfm.store.places import check_file
from mergekit_lfm.version import versions
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.patched import patched_view

if TYPE_CHECKING:
    from mergekit_lfm.edit.scores import FactScores

UNDO = "undo"  # the method of a patch that undoes others


@dataclass(frozen=True, slots=True)
class Applied:
    """The changes to a model: the file that undoes them (None after undoing), and how much is new.

    tensors: the number of changed tensors. bytes_changed: their size; bytes_copied: that of all others. after: the new
    model's scores on the facts that the patches teach, None if it was not judged. good: False if a smaller share of the
    facts than `min_efficacy` is what it says. changed: False if no tensor gets another value.
    """

    undo: Path | None
    tensors: int
    bytes_changed: int
    bytes_copied: int
    after: FactScores | None = None
    good: bool = True
    changed: bool = True


def undo_file(out: Path) -> Path:
    """The path of the file that undoes the patches applied to make the model in a folder."""
    named = out if out.name else out.resolve()
    return named.with_name(f"{named.name}.undo.safetensors")


def apply_patches(
    model: StrPath,
    patches: Sequence[StrPath],
    out: StrPath,
    *,
    any_base: bool = False,
    verify: bool = True,
    min_efficacy: float | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Applied]:
    """Write the model with the patches applied to a new folder, and beside it the file that undoes it.

    any_base: apply them to tensors of other values than they were made for. verify: load the new model from its files,
    in `dtype` on `device`, and score it on the facts that the patches teach, if they teach any. min_efficacy: the
    smallest share of these facts that it must say. memory: bytes, or text such as "4GB"; threads, overwrite: as of
    `merge`. The outcome's digest is that of the plan.

    Raises PlanError if a patch does not fit the model, the model cannot be verified or an output is in the way, before
    anything is written; ImportError if transformers, which verifying needs, is not installed.
    """
    started = time.monotonic()
    check_efficacy(min_efficacy, verify=verify)
    folder, files, target = model_folder(model), [expand(path, "patch") for path in patches], expand(out)
    source = open_model(folder)
    opened = [open_patch(path) for path in files]
    facts = facts_of(opened) if verify else None
    if facts is None and min_efficacy is not None:
        raise PlanError("--min-efficacy needs patches made from facts; these have none. Remove the option")
    if facts is not None:
        check_runs(source.path)
    view = patched_view(source, *opened, any_base=any_base)
    recipe = Recipe.parse(
        {"merge_method": "passthrough", "models": [{"model": str(folder), "edits": [*map(str, files)]}]}
    )
    plan = make_plan(recipe, views=(view,))
    undo = undo_file(target)
    touched = {name for patch in opened for name in patch.info.tensors}
    old = content_digest({source[name]: source.digest_of(name) for name in touched})
    made_from = {"plan": plan.digest, "content": old}
    known = undo.is_file() and read_patch_info(undo).options == made_from
    check_file(undo, [folder, *files], overwrite=overwrite or known)
    if not known:
        back = _reversal(source, view, touched)
        replace(back, info=replace(back.info, options=made_from)).save(undo)
    how: dict[str, Any] = {"memory": as_bytes(memory), "threads": threads, "overwrite": overwrite}
    with _remove_on_failure(None if known else undo):
        done = execute(plan, target, **how, progress=progress, doing="applying")
    applied = replace(_count_changes(plan, opened, undo), changed=has_changed(source, *opened))
    if facts is not None:
        after = score(load_for_texts(target, dtype, device), facts, "verifying", progress)
        note_scores(target, after)
        applied = replace(applied, after=after, good=is_enough(after, min_efficacy))
    warnings = warn_of(done.findings)
    return Outcome(target, applied, plan.digest, done.already_there, warnings, time.monotonic() - started)


def undo_patches(
    model: StrPath,
    out: StrPath,
    *,
    undo: StrPath | None = None,
    base: StrPath | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Applied]:
    """Write the model as it was before patches were applied to it, to the byte, to a new folder.

    undo: the file that applying them has left, by default the one beside the model. base: in its place the model that
    they were applied to: every tensor that differs is taken from there. Else as `apply_patches`.
    """
    started = time.monotonic()
    if undo is not None and base is not None:
        raise PlanError("found both an undo file and a base, expected one of them; leave the other out")
    folder, target = expand(model, "model"), expand(out)
    source = open_checkpoint(folder)
    file = undo_file(folder) if undo is None else expand(undo, "undo")
    edits = []
    if base is not None:
        original = model_folder(base)
        before = open_model(original)
        back = _reversal(before, source, _find_differences(source, before, folder, original))
    else:
        back = _open_undo(file)
        edits = [str(file)]
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [{"model": str(folder), "edits": edits}]})
    plan = make_plan(recipe, views=(patched_view(source, back),))
    how: dict[str, Any] = {"memory": as_bytes(memory), "threads": threads, "overwrite": overwrite}
    done = execute(plan, target, **how, progress=progress, doing="undoing")
    warnings = warn_of(done.findings)
    seconds = time.monotonic() - started
    return Outcome(target, _count_changes(plan, [back], None), plan.digest, done.already_there, warnings, seconds)


def _open_undo(file: Path) -> Patch:
    """The patch in an undo file. Raises PlanError for a missing file, and for any other patch."""
    if not file.is_file():
        raise PlanError(
            f"there is no {file}, which applying a patch has written beside the model; give it with --undo, or the "
            "model that the patch was applied to with --base"
        )
    back = open_patch(file)
    if back.info.method != UNDO:
        raise PlanError(f"{file} is a patch by {back.info.method}, expected the undo file that applying it left")
    return back


def _count_changes(plan: Plan, patches: Sequence[Patch], undo: Path | None) -> Applied:
    (view,) = plan.models
    changed = [view[name].nbytes for name in {name for patch in patches for name in patch.info.tensors}]
    return Applied(undo, len(changed), sum(changed), plan.bytes_written - sum(changed))


def has_changed(source: Checkpoint, *patches: Patch) -> bool:
    """True if the patches give some tensor of a model another value, rounded to its dtype."""
    view = patched_view(source, *patches, any_base=True)
    names = {name for patch in patches for name in patch.info.tensors}
    return any(view.digest_of(name) != source.digest_of(name) for name in names)


@contextmanager
def _remove_on_failure(file: Path | None) -> Iterator[None]:
    """Remove the file if the output that it belongs to was not written."""
    try:
        yield
    except BaseException:
        if file is not None:
            file.unlink(missing_ok=True)
        raise


def _reversal(before: Checkpoint, after: Checkpoint, names: set[str]) -> Patch:
    """The patch that gives the tensors their values before, applied to the checkpoint after."""
    wanted = [name for name in before if name in names]
    changed = {
        name: TensorChange("replace", before[name].shape, before[name].dtype, None, after.digest_of(name))
        for name in wanted
    }
    tensors = {name: before.read(name).view(before[name].shape) for name in wanted}
    return Patch(PatchInfo(UNDO, changed, versions=versions("torch")), tensors)


def _find_differences(model: Checkpoint, base: Checkpoint, label: Path, base_label: Path) -> set[str]:
    """The tensors whose bytes differ. Raises PlanError if the models do not have the same tensors."""
    problems = [f"{spec} is not in both" for spec in {*model.values()} ^ {*base.values()}]
    if problems:
        raise PlanError(
            f"{label} and {base_label} do not have the same tensors:\n  "
            + "\n  ".join(sorted(problems)[:10])
            + "\ngive the model that the patch was applied to"
        )
    return {name for name in model if model.digests[name] != base.digests[name]}
