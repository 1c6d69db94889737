"""The two ends of a line between models: open both, rewrite the second by an alignment, and check that they match.

Tensors are paired by their names in the modules: modules of one class agree on these, whatever the files call them.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.sources import aligned_view
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.adapted import open_model, with_adapters
from mergekit_lfm.views.base import View
from mergekit_lfm.views.rewritten import rewrite

EndModel = str | Path | Loaded | nn.Module
Opened = Loaded | nn.Module
Alignment = str | Path | Transform


def module_of(model: Opened) -> nn.Module:
    """The torch module of a model."""
    return model.model if isinstance(model, Loaded) else model


def load_end(model: EndModel, task: str, device: str = "cpu") -> Opened:
    """The model; from a folder it is loaded for the task, in float32."""
    return load_model(with_adapters(model), task, device=device) if isinstance(model, str | Path) else model


def open_aligned(model: EndModel, alignment: Alignment | None, to: Opened, task: str, device: str = "cpu") -> Opened:
    """A new model, rewritten by the alignment; without one the result of `load_end`.

    If the alignment changes shapes, the result has the config, or a copy of the module, of `to`, the model that it is
    aligned to. Raises PlanError for an alignment of another model.
    """
    if alignment is None:
        return load_end(model, task, device)
    if isinstance(model, nn.Module):
        return _rewrite_module(model, alignment, module_of(to))
    checkpoint = model.checkpoint if isinstance(model, Loaded) else open_model(model)
    view = _view(checkpoint, alignment)
    if isinstance(to, Loaded) and any(view[name].shape != spec.shape for name, spec in checkpoint.items()):
        view = view.in_folder(to.checkpoint.path)
    return load_model(view, task, device=device)


def _view(checkpoint: Checkpoint, alignment: Alignment) -> View:
    if not isinstance(alignment, Transform):
        return aligned_view(checkpoint, Path(alignment), str(alignment), checkpoint.path)
    with TemporaryDirectory() as folder:  # views are identified by files
        file = Path(folder) / "transform.safetensors"
        alignment.save(file)
        return aligned_view(checkpoint, file, "the transform", checkpoint.path)


def _rewrite_module(module: nn.Module, alignment: Alignment, to: nn.Module) -> nn.Module:
    transform = alignment if isinstance(alignment, Transform) else open_transform(alignment)
    old = _tensors(module)
    new = rewrite({name: x.detach().cpu() for name, x in old.items()}, transform)
    fits = all(new[name].shape == x.shape for name, x in old.items())
    result = deepcopy(module if fits else to)
    try:
        result.load_state_dict(new)
    except RuntimeError as error:
        raise PlanError(
            f"{type(to).__name__} cannot hold the tensors of the aligned {type(module).__name__}: {error}; align "
            "models of one class"
        ) from None
    return result


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}


def common_tensors(first: Opened, second: Opened) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The floating-point parameters and buffers of both, by the same names.

    The first model's integer tensors, such as counts of batches, stay as they are. Raises PlanError with all tensors
    that one of them lacks or has in another shape, and all integer tensors that differ except counts of batches; and
    for different tokens.
    """
    one, other = (_tensors(module_of(model)) for model in (first, second))
    problems = [f"{name} is only in the first" for name in one if name not in other]
    problems += [f"{name} is only in the second" for name in other if name not in one]
    for name, x in one.items():
        y = other.get(name, x)
        if x.shape != y.shape:
            problems.append(f"{name} is {list(x.shape)} in the first, {list(y.shape)} in the second")
        elif not (x.is_floating_point() or name.endswith("num_batches_tracked") or bool((x == y.to(x.device)).all())):
            problems.append(f"{name} holds whole numbers that differ")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise PlanError(
            "the two models cannot be interpolated:\n  "
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
            "the same: one row of their embeddings would stand for two tokens. Give models with one vocabulary"
        )
