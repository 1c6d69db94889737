"""`verify_output`: an output compared with its lock, and if asked for with the inputs that it was made from."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lfm.api.arguments import StrPath, as_bytes, expand
from mergekit_lfm.api.merge_plans import RecipeLike, plan_merge
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.planned import PlannedMerge, Stages
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.elsewhere import find_elsewhere, name_elsewhere

if TYPE_CHECKING:
    from mergekit_lfm.output.lock import Lock
    from mergekit_lfm.store.snapshot import Snapshot


@dataclass(frozen=True)
class Verified:
    """The result of a comparison with a lock: one line for each difference, and for all that the lock cannot show.

    bytes_read: of the files with weights. recomputed: the tensors that were computed again from the inputs.
    """

    differences: tuple[str, ...]
    not_covered: tuple[str, ...]
    bytes_read: int = 0
    recomputed: tuple[str, ...] = ()


def verify_output(
    out: StrPath,
    *,
    against_inputs: RecipeLike | None = None,
    sample: int | Literal["all"] = 8,
    max_shard_size: int | str | None = None,
    seed: int | None = None,
    heads: Literal["base", "drop"] | None = None,
    device: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    progress: Progress = SILENCE,
) -> Outcome[Verified]:
    """Read an output of `merge`, or an adapter with a lock, again and compare it with its lock.

    out: its folder, or its name on the Hub or address in a bucket: then it is downloaded to the cache, without what the
    lock does not name. against_inputs: the recipe of the merge: its models are read again and compared with the lock,
    too, and so many of the tensors are computed again, or "all" of them; the other options are those that `merge` was
    given. The outcome's digest is that of the plan. Raises FormatError if it has no lock, PlanError if it is of another
    recipe.
    """
    from mergekit_lfm.output.card import CARD, OWN_CARD
    from mergekit_lfm.output.lock import INPUTS_NOT_COVERED, LOCK, NOT_COVERED, read_lock, verify

    started = time.monotonic()
    snapshot = None if Path(out).exists() else _pull(str(out), progress)
    folder = expand(out, "OUT") if snapshot is None else snapshot.folder
    lock = read_lock(folder)
    planned = None
    if against_inputs is not None and lock.name != LOCK:
        raise PlanError(f"{out} is an adapter, expected the output of a merge; verify it without its inputs")
    if against_inputs is not None:
        how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "heads": heads, "device": device}
        how["allow_unknown"] = True  # as when it was merged, if it has any
        planned = plan_merge(against_inputs, folder, **how).result
        if planned.stages is not None:
            planned = plan_merge(_on_results(planned.stages, out), folder, **how).result
        planned = _plan_of(planned, lock, out, progress)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress.by_bytes(nbytes, "verifying") as advance:
        differences = verify(folder, advance, alone=snapshot is None)
    if snapshot is not None and OWN_CARD in snapshot.sizes:  # beside a card that was edited there
        differences = [line for line in differences if not line.startswith(f"{CARD} ")]
    names = list[str]()
    if planned is not None and lock.intact:
        names, more = _compare_inputs(planned, lock, sample, as_bytes(memory), threads, progress)
        differences += more
    others = () if snapshot is None else ("files there that the lock does not name",)
    inputs = (INPUTS_NOT_COVERED,) if planned is None else ()
    verified = Verified(tuple(differences), (*inputs, *NOT_COVERED, *others), nbytes, tuple(names))
    return Outcome(folder, verified, lock.plan, seconds=time.monotonic() - started)


def _on_results(stages: Stages, out: StrPath) -> Recipe:
    """The recipe of the last stage on what the others have left. Raises PlanError if that is gone."""
    gone = [name for name, place in stages.places.items() if not place.exists()]
    if gone:
        raise PlanError(
            f"{out} was made from the stages {', '.join(gone)}, which are no longer in {stages.folder}: merge again "
            "without --drop-stages to make them, or verify OUT without its inputs"
        )
    recipe = stages.recipe(stages.last)
    assert isinstance(recipe, Recipe)
    return recipe


def _plan_of(planned: PlannedMerge, lock: Lock, out: StrPath, progress: Progress) -> PlannedMerge:
    """The plan, ready, of the merge that has made an output. Raises PlanError if another one has."""
    from mergekit_lfm.api.prepare import note_device, prepare_models

    device = planned.accelerator.name
    plan = note_device(planned.plan, device)
    if plan.digest != lock.plan:
        raise PlanError(
            "{place} is not the output of this recipe: its lock is of plan {found}, the recipe's is {expected}. {cure}",
            place=out,
            found=lock.plan,
            expected=plan.digest,
            cure="Give the recipe, the models and the options that it was merged with, and the same versions",
        )
    if plan.recipe.result_edits and plan.added is None:
        raise PlanError(
            f"{out} was edited after the merge with facts, which would have to be learned again; expected a recipe "
            "whose own `edits` are patch files. Verify it without its inputs"
        )
    return replace(planned, plan=prepare_models(plan, device, progress))


def _compare_inputs(
    planned: PlannedMerge,
    lock: Lock,
    sample: int | Literal["all"],
    memory: int | None,
    threads: int | None,
    progress: Progress,
) -> tuple[list[str], list[str]]:
    """The tensors that were computed again, and the differences of inputs and of these tensors from a lock."""
    from mergekit_lfm.engine.inputs import Comparison
    from mergekit_lfm.engine.recompute import choose, recompute
    from mergekit_lfm.machine.resources import default_memory

    plan, budget = planned.plan, memory or default_memory()
    changed = Comparison(plan, budget, threads, progress).find_changes(lock)
    if changed:
        return [], [f"{name} of {plan.source_labels[source]} was changed" for source, name in changed]
    names = choose(plan, sample)
    how: dict[str, Any] = {"memory": budget, "threads": threads, "accelerator": planned.accelerator}
    differing = recompute(plan, lock, names, **how, progress=progress)
    return names, [f"{name} is not what the inputs give" for name in differing]


def _pull(name: str, progress: Progress) -> Snapshot | None:
    """The output elsewhere with this name, downloaded; None for other text. Raises FormatError without a lock."""
    from mergekit_lfm.output.lock import LOCK, covered_files

    model = name_elsewhere(name)
    if model is None:
        return None
    snapshot = find_elsewhere(model)
    if LOCK not in snapshot.sizes:
        raise FormatError(f"{snapshot} has no {LOCK}: it is not an output of `merge`")
    snapshot.fetch([LOCK])
    snapshot.fetch([file for file in covered_files(snapshot.folder) if file in snapshot.sizes], progress)
    return snapshot
