"""`average_attachments`: several bottleneck adapters to one; and models that are loaded with one to be run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.state_dicts import merge_state_dicts
from mergekit_lfm.api.tune_plans import SUFFIX, file_request
from mergekit_lfm.artifacts.attachment import Attachment, is_attachment, open_attachment, refuse_prompts
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.output.file_request import FileRequest
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, is_adapted
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.version import versions
from mergekit_lfm.views.adapted import open_found

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded

JOB = "average"


@dataclass(frozen=True, slots=True)
class Averaged:
    """The result: the shares of the adapters in it, and the number of its tensors."""

    shares: tuple[float, ...]
    tensors: int


def average_attachments(
    attachments: Sequence[StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Outcome[Averaged]:
    """Average bottleneck adapters of one model to one, tensor by tensor, as `linear` merges models.

    attachments: files that `tune_model` wrote by one method with one config, on one base. weights: one for each, 1 by
    default; their sum is the divisor. Those by `compacter` are written out as plain ones before, so that matrices are
    averaged and not their factors. If `out` holds the result of the same request already, nothing is done. The
    outcome's digest is that of the request. Raises PlanError for adapters that do not go together, FormatError for
    other files.
    """
    from mergekit_lfm.runtime.attach import expand_attachment

    started, target = time.monotonic(), expand(out)
    files = [expand(path, "attachment") for path in attachments]
    shares = _shares(files, weights)
    if target.suffix != SUFFIX:
        raise PlanError(f"{target}: the average is a file; give a name that ends in {SUFFIX}")
    opened = [open_attachment(file) for file in files]
    for file, each in zip(files, opened, strict=True):
        refuse_prompts(each.info, file)
    _check_alike(files, opened)
    request = _request([os.fspath(path) for path in attachments], files, opened, shares)
    there = request.is_answered(target, overwrite=overwrite)
    averaged = Averaged(shares, len(opened[0].tensors))
    if not there:
        made = [expand_attachment(each) for each in opened]
        tensors = merge_state_dicts([each.tensors for each in made], "linear", parameters={"weight": [*shares]})
        averaged = Averaged(shares, len(tensors))
        base = made[0].info.base
        assert base is not None
        options = {"request": request.request.digest, "recipe": request.request.public, "result": asdict(averaged)}
        target.parent.mkdir(parents=True, exist_ok=True)
        Attachment(made[0].info, tensors).made_for(base, options, versions("torch")).save(target)
    return Outcome(target, averaged, request.request.digest, there, seconds=time.monotonic() - started)


def _shares(files: Sequence[Path], weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weights as shares of 1. Raises PlanError for another number of them, and without a sum."""
    given = [1.0] * len(files) if weights is None else [float(weight) for weight in weights]
    if len(files) < 2 or len(given) != len(files):
        raise PlanError(
            f"found {len(files)} adapters and {len(given)} weights, expected two adapters or more, and a weight for "
            "each. Add some"
        )
    if not 0 < sum(given) < float("inf") or min(given) < 0:
        raise PlanError(f"weights are {', '.join(f'{w:g}' for w in given)}; expected none below 0, and a sum above 0")
    return tuple(weight / sum(given) for weight in given)


def _check_alike(files: Sequence[Path], opened: Sequence[Attachment]) -> None:
    """Raise PlanError about all adapters that are not of the first one's model, form and shapes."""
    first, problems = opened[0], list[str]()
    for file, other in zip(files[1:], opened[1:], strict=True):
        for fact in ("base", "form", "config", "replaced"):
            one, here = (getattr(each.info, fact) for each in (first, other))
            if one != here:
                problems.append(f"{file}: {fact} is {here}, expected {one} as of {files[0]}")
        shapes = [{name: x.shape for name, x in each.tensors.items()} for each in (first, other)]
        if shapes[0] != shapes[1]:
            problems.append(f"{file}: its tensors are not those of {files[0]}")
    if problems:
        text = several("adapters that do not go together", problems)
        raise PlanError(f"{text}\nGive adapters by one method with one config, tuned on one model")


def _request(
    refs: Sequence[str], files: Sequence[Path], opened: Sequence[Attachment], shares: Sequence[float]
) -> FileRequest:
    """The request that the average answers."""
    names = public_names(refs)
    whole: dict[str, Any] = {"job": JOB, "weights": [*shares]}
    public = {**whole, "attachments": [names[ref] for ref in refs]}
    inputs = tuple(
        RequestInput(ref, open_checkpoint(file), {**asdict(each.info), "options": {}, "versions": {}})
        for ref, file, each in zip(refs, files, opened, strict=True)
    )
    return file_request(Request(whole, public, inputs, LOCK), tuple(files), "attachment")


@dataclass(frozen=True)
class ReadModel:
    """A model that runs, as the recipe names it. attached: what runs with it and changes no weight."""

    ref: str
    source: Checkpoint
    attached: AdapterRef | None

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of what runs with it."""
        source = None if self.attached is None else self.attached.source
        return (source,) if isinstance(source, Path) else ()

    def load(self, task: str, device: str, dtype: str = "float32") -> Loaded:
        """The model, ready to run."""
        return load_with(self.source, self.attached, task, dtype=dtype, device=device)


def load_attached(model: StrPath, task: str, *, device: str = "cpu") -> Loaded:
    """Load the model that a text names, MODEL or MODEL+ADAPTER, for a task, to be run.

    One of the adapters may be an attachment. Raises PlanError for several, or for a share of one, FormatError for one
    of another model, and else as `load_model`.
    """
    from mergekit_lfm.runtime.load import load_model

    if not is_adapted(model):
        return load_model(Path(model), task, device=device)
    found, attached = split_attached(find_reference(os.fspath(model), Where()))
    return load_with(open_found(found), attached, task, device=device)


def split_attached(found: FoundModel) -> tuple[FoundModel, AdapterRef | None]:
    """A model with those of its adapters that change its weights, and the attachment among them, if there is one.

    Raises PlanError for several, or for a share of one.
    """
    attached = [ref for ref in found.adapters if is_attachment(ref.source)]
    if not attached:
        return found, None
    if len(attached) > 1 or attached[0].scale != 1:
        given = "+".join(f"{ref.scale:g}*{ref.ref}" for ref in attached)
        raise PlanError(
            f"found {given}, expected one bottleneck adapter, as a whole; average several with `mergekit-lfm average`"
        )
    return replace(found, adapters=tuple(ref for ref in found.adapters if ref not in attached)), attached[0]


def open_named(named: FoundModel) -> ReadModel:
    """A model that a recipe names, by its headers."""
    found, attached = split_attached(named)
    return ReadModel(named.ref, open_found(found), attached)


def load_with(
    source: Checkpoint, attached: AdapterRef | None, task: str, *, dtype: str = "float32", device: str = "cpu"
) -> Loaded:
    """Load a model for a task, with an attachment if one is given. Raises FormatError for one of another model."""
    from mergekit_lfm.runtime.attach import attach
    from mergekit_lfm.runtime.load import load_model

    loaded = load_model(source, task, dtype=dtype, device=device)
    if attached is not None:
        assert isinstance(attached.source, Path)
        attach(loaded.model, open_attachment(attached.source), source.content, attached.ref)
    return loaded
