"""The Python interface: merge checkpoints by a recipe, or tensors in memory by a method."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.sizes import parse_size
from mergekit_lfm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_lfm.machine.accelerators import Accelerator


def merge(
    recipe: str | PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    max_shard_size: int | str | None = None,
    seed: int | None = None,
    device: str | None = None,
    nan: Literal["error", "warn"] = "error",
    overwrite: bool = False,
    resume: bool = True,
    compile: Literal["auto", "always", "never"] = "auto",
    push_to: str | None = None,
    private: bool = False,
) -> Path:
    """Merge checkpoints as a recipe says (a YAML file, a mapping, or a `Recipe`) and return the output folder.

    out: by default the recipe's `output`, else `merged/<name of the recipe file>`. memory and max_shard_size: bytes,
    or text such as "4GB". device: "cpu", "cuda", "cuda:1" or "auto", in place of the recipe's. compile: as of
    `execute`. push_to: a repository on the Hub that the result is pushed to, in place of the recipe's `push`; private:
    it has to be private. Raises PlanError or FormatError (both ValueError) with all that is wrong, before anything is
    written where it can be known then; ConnectionError where the Hub cannot be reached. Calling it again after an
    interruption goes on where it stopped.
    """
    from mergekit_lfm.engine.execute import execute
    from mergekit_lfm.plan.plan import make_plan

    if isinstance(recipe, Mapping):
        recipe = Recipe.parse(recipe)
    elif not isinstance(recipe, Recipe):
        source, recipe = Path(recipe), Recipe.load(Path(recipe))
        out = out or default_output(recipe, source)
    out = out or recipe.output
    if out is None:
        raise PlanError("no output: pass `out`, or give the recipe an `output`")
    out = _output(out)
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    goal, gpu = recipe.goal(push_to, private=private), accelerator_of(recipe, device)
    plan = make_plan(recipe, max_shard_size=_bytes(max_shard_size))
    if goal is not None:
        from mergekit_lfm.output.push import check_repository, push

        check_repository(goal.repo, private=goal.private)
    how: dict[str, Any] = {"memory": _bytes(memory), "threads": threads, "nan": nan, "overwrite": overwrite}
    how |= {"resume": resume}
    if plan.unedited:
        from mergekit_lfm.edit.stages import solve_edits
        from mergekit_lfm.machine.accelerators import name_of

        plan = solve_edits(plan, out, max_shard_size=_bytes(max_shard_size), device=name_of(gpu), **how)
    outcome = execute(plan, out, gpu=gpu, compile=compile, **how)
    if goal is not None:
        push(out, goal.repo, private=goal.private)
    return outcome.path


def accelerator_of(recipe: Recipe, device: str | None) -> Accelerator | None:
    """The GPU that is asked for, by name or by the recipe; None for the processor. PlanError where it is not there."""
    asked = recipe.device if device is None else device
    if asked == "cpu":
        return None
    from mergekit_lfm.machine.accelerators import Accelerator
    from mergekit_lfm.machine.devices import find_gpu

    gpu = find_gpu(asked)
    return None if gpu is None else Accelerator(gpu)


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


def default_output(recipe: Recipe, source: Path) -> Path:
    """Where a recipe's output goes that names no other place."""
    return _output(recipe.output or Path("merged") / source.stem)


def _output(place: str | PathLike[str]) -> Path:
    """The path, "~" replaced by the home folder."""
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise PlanError(f"output: found {str(place)!r}, which names nobody's home; write the path in full") from None
