"""The attachment: a small module that runs with a model, and not a change of its weights: a bottleneck adapter.

It is one safetensors file: the tensors of the module by their names in the model's trunk, and the tensors of the model
that it replaces, such as a classifier's head. The metadata say which form of module it is, how it is built, which
content of a model it belongs to, and how it was made. `runtime.attach` has it run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.header import Kind, save_tensors
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.store.tensors import read_header

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = "prompts"  # the form of a mixture of prompts, which stands before texts
TEMPLATE = "template"  # the form of a template that texts stand in
ATTACHMENT = Kind("bottleneck adapter", "mergekit-lfm tune --method houlsby", "tune again")
NO_WEIGHTS = (
    "{label} is a bottleneck adapter, which is not a change of a weight and cannot be merged into weights; run it with "
    "`mergekit-lfm eval MODEL+FILE`, or average several with `mergekit-lfm average`"
)


@dataclass(frozen=True, slots=True)
class AttachmentInfo:
    """An attachment's metadata.

    method: the way of tuning that made it. form: of its module, a row of `runtime.bottlenecks.FORMS`; config: how that
    is built. base: the content digest (`Checkpoint.content`) of its model, None if unknown. replaced: the names of
    tensors that stand in place of the model's. options: the request, the recipe and the result.
    """

    method: str
    form: str
    config: Mapping[str, Any]
    base: str | None = None
    replaced: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attachment:
    """A module that runs with a model. tensors: by their names in a file, those that replace the model's among them."""

    info: AttachmentInfo
    tensors: Mapping[str, Tensor] = field(repr=False)

    def made_for(self, base: str, options: Mapping[str, Any], versions: Mapping[str, str]) -> Attachment:
        """This attachment, tied to the content of its model, with what is known of its making."""
        return replace(self, info=replace(self.info, base=base, options=options, versions=versions))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the attachment to a file."""
        specs = [spec_of(name, x) for name, x in self.tensors.items()]
        save_tensors(Path(path), specs, self.tensors.__getitem__, ATTACHMENT.encode(asdict(self.info)))


def read_attachment_info(path: Path) -> AttachmentInfo:
    """The metadata in an attachment's header. Raises FormatError for any other file."""

    def build(facts: dict[str, Any]) -> AttachmentInfo:
        return AttachmentInfo(**{**facts, "config": dict(facts["config"]), "replaced": tuple(facts["replaced"])})

    return ATTACHMENT.decode(read_header(path).metadata, AttachmentInfo.__dataclass_fields__, build, path)


def open_attachment(path: str | os.PathLike[str]) -> Attachment:
    """The attachment in a file. Raises FormatError if it holds none, FileNotFoundError if it does not exist."""
    file = ATTACHMENT.find(path)
    info = read_attachment_info(file)
    stored = open_checkpoint(file)
    if lost := sorted({*info.replaced} - stored.keys()):
        raise FormatError(f"{file}: {lost[0]} is in its metadata, and not in its data; {ATTACHMENT.again}")
    tensors = {name: stored.read(name).view(spec.shape) for name, spec in stored.items()}
    if wrong := [name for name, x in tensors.items() if not bool(x.isfinite().all())]:
        raise FormatError(f"{file}: {wrong[0]} is not finite; {ATTACHMENT.again}")
    return Attachment(info, tensors)


def is_attachment(path: object) -> bool:
    """Whether a path is a file that says it is an attachment."""
    return ATTACHMENT.is_at(path)


def refuse_attachment(path: object, label: object) -> None:
    """Raise FormatError for an attachment, where weights are needed."""
    if isinstance(path, Path) and is_attachment(path):
        refuse_prompts(read_attachment_info(path), label)
        raise FormatError(NO_WEIGHTS.format(label=label))


def refuse_prompts(info: AttachmentInfo, label: object) -> None:
    """Raise FormatError for a mixture of prompts or a template, where weights or modules are needed."""
    if info.form in (PROMPTS, TEMPLATE):
        name = "a template" if info.form == TEMPLATE else "a mixture of prompts"
        raise FormatError(
            f"{label} is {name}, which changes no weights and no layers; run its model with it, as "
            f"`mergekit-lfm eval MODEL --prompt {label}` does"
        )
