"""Patches applied to saved models, and undone to the byte: what they leave alone is copied by the kernel.

Both are merges of one model, read through a view: with the writer's safety, its lock, and the same files. The undo file
is a patch, too: of the tensors that were changed, as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange, open_patch, read_patch_info
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.plan import Plan, make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.places import check_file
from mergekit_lfm.version import versions
from mergekit_lfm.views.base import RewrittenFile
from mergekit_lfm.views.patched import patched_view

UNDO = "undo"  # the method of a patch that undoes others


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done: the folder written, the file that undoes it (None after undoing), and how much was made anew.

    tensors: how many have changed. bytes_changed: those of these tensors; bytes_copied: of all others.
    """

    out: Path
    undo: Path | None
    tensors: int
    bytes_changed: int
    bytes_copied: int
    already_there: bool = False


def undo_file(out: Path) -> Path:
    """Where the file lies that undoes what was applied to make the model in a folder."""
    named = out if out.name else out.resolve()
    return named.with_name(f"{named.name}.undo.safetensors")


def apply_patches(
    model: Path,
    patches: Sequence[Path],
    out: Path,
    *,
    any_base: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Applied:
    """Write the model with the patches applied to a new folder, and beside it the file that undoes it.

    any_base: apply them to tensors of other values than they were made for. memory, threads, overwrite, progress: as of
    `execute`. PlanError where a patch does not fit the model or an output is in the way, before anything is written.
    """
    source = open_checkpoint(model)
    opened = [open_patch(path) for path in patches]
    view = patched_view(source, *opened, any_base=any_base)
    recipe = Recipe.parse(
        {"merge_method": "passthrough", "models": [{"model": str(model), "edits": [*map(str, patches)]}]}
    )
    plan = make_plan(recipe, views=(view,))
    undo = undo_file(out)
    known = undo.is_file() and read_patch_info(undo).options.get("plan") == plan.digest
    check_file(undo, [model, *patches], overwrite=overwrite or known)
    if not known:
        back = _back(source, view, {name for patch in opened for name in patch.facts.tensors})
        replace(back, facts=replace(back.facts, options={"plan": plan.digest})).save(undo)
    with _removed_on_failure(None if known else undo):
        return _written(plan, out, undo, memory=memory, threads=threads, overwrite=overwrite, progress=progress)


def undo_patches(
    model: Path,
    out: Path,
    *,
    undo: Path | None = None,
    base: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Applied:
    """Write the model as it was before patches were applied to it, to the byte, to a new folder.

    undo: the file that applying them has left, by default the one beside the model. base: in its place the model that
    they were applied to: every tensor that differs is taken from there. Else as `apply_patches`.
    """
    if undo is not None and base is not None:
        raise PlanError("found both an undo file and a base, expected one of them; leave the other out")
    source = open_checkpoint(model)
    given = base or undo or undo_file(model)
    if base is not None:
        back = _back(open_checkpoint(base), source, _differing(source, open_checkpoint(base), model, base))
    elif not given.is_file():
        raise PlanError(
            f"there is no {given}, which applying a patch has written beside the model; give it with --undo, or the "
            "model that the patch was applied to with --base"
        )
    else:
        back = open_patch(given)
        if back.facts.method != UNDO:
            raise PlanError(f"{given} is a patch by {back.facts.method}, expected the undo file that applying it left")
    edits = [] if base else [str(given)]
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [{"model": str(model), "edits": edits}]})
    plan = make_plan(recipe, views=(patched_view(source, back),))
    return _written(plan, out, None, memory=memory, threads=threads, overwrite=overwrite, progress=progress)


def _written(
    plan: Plan,
    out: Path,
    undo: Path | None,
    *,
    memory: int | None,
    threads: int | None,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> Applied:
    outcome = execute(plan, out, memory=memory, threads=threads, overwrite=overwrite, progress=progress)
    (view,) = plan.models
    changed = [spec.nbytes for name, spec in view.items() if not _left_alone(view, name)]
    copied = plan.bytes_written - sum(changed)
    return Applied(out, undo, len(changed), sum(changed), copied, outcome.already_there)


def _left_alone(view: Checkpoint, name: str) -> bool:
    file = view.file_of(name)
    return not isinstance(file, RewrittenFile) or file.rewriters[name].idle


@contextmanager
def _removed_on_failure(file: Path | None) -> Iterator[None]:
    """Remove the file where what it belongs to was not written, and nothing is kept of it either."""
    try:
        yield
    except BaseException:
        if file is not None:
            file.unlink(missing_ok=True)
        raise


def _back(before: Checkpoint, after: Checkpoint, names: set[str]) -> Patch:
    """The patch that gives the tensors their values before, applied to the checkpoint after."""
    wanted = [name for name in before if name in names]
    changed = {
        name: TensorChange("replace", before[name].shape, before[name].dtype, None, after.digest_of(name))
        for name in wanted
    }
    held = {name: before.read(name).view(before[name].shape) for name in wanted}
    return Patch(PatchInfo(UNDO, changed, versions=versions("torch")), held)


def _differing(model: Checkpoint, base: Checkpoint, label: Path, base_label: Path) -> set[str]:
    """The tensors of other bytes in both. PlanError where the models do not have the same tensors."""
    problems = [f"{spec} is not in both" for spec in {*model.values()} ^ {*base.values()}]
    if problems:
        raise PlanError(
            f"{label} and {base_label} do not have the same tensors:\n  "
            + "\n  ".join(sorted(problems)[:10])
            + "\ngive the model that the patch was applied to"
        )
    return {name for name in model if model.digests[name] != base.digests[name]}
