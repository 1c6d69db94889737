"""The two ends of a line between models: opened, the second one rewritten where an alignment says so, and comparable.

Modules of one class name their tensors alike whatever the files call them, so it is theirs that are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.sources import rewritten_by
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.views.rewritten import rewrite

Model = str | Path | Loaded | nn.Module
Opened = Loaded | nn.Module
Alignment = str | Path | Transform
Progress = Callable[[int, int], None]  # called with how much is done, and how much there is


def module_of(model: Opened) -> nn.Module:
    """What runs."""
    return model.model if isinstance(model, Loaded) else model


def open_model(model: Model, task: str, device: str = "cpu") -> Opened:
    """The model; one that is given as a folder is loaded for the task, in float32."""
    return load_model(model, task, device=device) if isinstance(model, str | Path) else model


def open_aligned(model: Model, alignment: Alignment | None, to: Opened, task: str, device: str = "cpu") -> Opened:
    """The model as the alignment rewrites it, a new one; without an alignment as `open_model` has it.

    What an alignment gives other shapes gets the config, or the module, of the model that it is brought near `to`.
    Raises PlanError for an alignment of another model.
    """
    if alignment is None:
        return open_model(model, task, device)
    if isinstance(model, nn.Module):
        return _rewritten_module(model, alignment, module_of(to))
    checkpoint = model.checkpoint if isinstance(model, Loaded) else open_checkpoint(model)
    view = _view(checkpoint, alignment)
    if isinstance(to, Loaded) and any(view[name].shape != spec.shape for name, spec in checkpoint.items()):
        view = Checkpoint(to.checkpoint.path, view.files, view.view)
    return load_model(view, task, device=device)


def _view(checkpoint: Checkpoint, alignment: Alignment) -> Checkpoint:
    if not isinstance(alignment, Transform):
        return rewritten_by(checkpoint, Path(alignment), str(alignment), checkpoint.path)
    with TemporaryDirectory() as folder:  # a file is what tells one view from another
        file = Path(folder) / "transform.safetensors"
        alignment.save(file)
        return rewritten_by(checkpoint, file, "the transform", checkpoint.path)


def _rewritten_module(module: nn.Module, alignment: Alignment, to: nn.Module) -> nn.Module:
    transform = alignment if isinstance(alignment, Transform) else open_transform(alignment)
    old = _tensors(module)
    new = rewrite({name: x.detach().cpu() for name, x in old.items()}, transform)
    fits = all(new[name].shape == x.shape for name, x in old.items())
    result = deepcopy(module if fits else to)
    try:
        result.load_state_dict(new)
    except RuntimeError as error:
        raise PlanError(
            f"{type(to).__name__} cannot hold what the alignment makes of {type(module).__name__}: {error}; align "
            "models of one class"
        ) from None
    return result


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}


def common_tensors(first: Opened, second: Opened) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and buffers of floating point of both, by the same names.

    Of whole numbers the first one's stay as they are, those that count batches for one. PlanError about all tensors
    that one of them lacks or has in another shape, all of whole numbers that differ, and about different tokens.
    """
    one, other = (_tensors(module_of(model)) for model in (first, second))
    problems = [f"{name} is only in the first" for name in one if name not in other]
    problems += [f"{name} is only in the second" for name in other if name not in one]
    for name, x in one.items():
        y = other.get(name, x)
        if x.shape != y.shape:
            problems.append(f"{name} is {list(x.shape)} in the first, {list(y.shape)} in the second")
        elif not (x.is_floating_point() or name.endswith("num_batches_tracked") or bool((x == y.to(x.device)).all())):
            problems.append(f"{name} are whole numbers, and differ")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise PlanError(
            "there is no line between the two models:\n  "
            + "\n  ".join(shown)
            + "\nGive models of one architecture, size and set of classes"
        )
    if isinstance(first, Loaded) and isinstance(second, Loaded):
        _check_tokens(first, second)
    floats = [name for name, x in one.items() if x.is_floating_point()]
    return {name: one[name] for name in floats}, {name: other[name] for name in floats}


def _check_tokens(first: Loaded, second: Loaded) -> None:
    if first.tokenizer is None or second.tokenizer is None:
        return
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise PlanError(
            f"{first.checkpoint.path} and {second.checkpoint.path} have different tokens in their tokenizers, expected "
            "the same: the same row of their embeddings would mean two tokens. Give models with one vocabulary"
        )
