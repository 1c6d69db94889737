"""`export_attached`: a model with a bottleneck adapter as a folder of its own, with code that transformers runs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.attachments import split_attached
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.artifacts.attachment import open_attachment
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.output.save import make_folder
from mergekit_lfm.output.written import CONFIG, copy_sidecars, lock_written, stored_tensors
from mergekit_lfm.recipe.adapters import AdapterRef
from mergekit_lfm.recipe.files import Where, find_reference
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import read_json
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.views.adapted import open_found

JOB = "export"
CODE = "modeling_attached.py"
# The task to load a model for by its saved class, and the class of transformers that loads the result.
AUTO = {
    "ForCausalLM": ("lm", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("classification", "AutoModelForImageClassification"),
    "ForMaskedLM": ("masked_lm", "AutoModelForMaskedLM"),
    "": ("embedding", "AutoModel"),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """The result. code: the file with the class, `class_name`, that `auto` of transformers loads."""

    code: str
    class_name: str
    auto: str


def export_attached(model: StrPath, out: StrPath, *, overwrite: bool = False) -> Outcome[Exported]:
    """Write a model with a bottleneck adapter, MODEL+FILE, as a folder that transformers loads with its code.

    Its modules are tensors beside the model's, and the classes that run them are in modeling_attached.py, for
    `from_pretrained(..., trust_remote_code=True)`. The model's tensors keep their dtypes, the modules are in float32.
    The outcome's digest is that of the request. Raises PlanError for a model without such an adapter, or one that is
    trained of several (`adamix` is saved as one), FormatError for an adapter of another model.
    """
    started, target, text = time.monotonic(), expand(out), os.fspath(model)
    found, attached = split_attached(find_reference(text, Where()))
    if attached is None or not isinstance(attached.source, Path):
        raise PlanError(f"{text} has no bottleneck adapter, expected MODEL+FILE with one; merge other adapters")
    source = open_found(found)
    names = public_names([found.ref, attached.ref])
    inputs = (
        RequestInput(found.ref, source, source.config),
        RequestInput(attached.ref, open_checkpoint(attached.source), asdict(open_attachment(attached.source).info)),
    )
    whole = {"job": JOB, "model": found.ref, "attachment": attached.ref}
    public = {"job": JOB, "model": names[found.ref], "attachment": names[attached.ref]}
    request = Request(whole, public, inputs, LOCK)
    base = next(iter(source.config.get("architectures") or []), "")
    task, auto = next(value for end, value in AUTO.items() if base.endswith(end))
    exported = Exported(CODE, f"Attached{base}", auto)
    there = request.is_answered(target, overwrite=overwrite)
    if not there:
        _write(target, source, attached, task, exported, request)
    left = [f"{name} is left behind: {why}" for name, why in sidecars_of(source).missed]
    return Outcome(target, exported, request.digest, there, warn_of(left), time.monotonic() - started)


def _write(
    out: Path, source: Checkpoint, attached: AdapterRef, task: str, exported: Exported, request: Request
) -> None:
    """Write the folder."""
    from mergekit_lfm.runtime.attach import attach, expand_attachment
    from mergekit_lfm.runtime.load import load_model, save_quietly
    from mergekit_lfm.runtime.standalone import describe_places, write_code

    _ = request.digest
    assert isinstance(attached.source, Path)
    attachment = expand_attachment(open_attachment(attached.source))
    model: Any = load_model(source, task).model
    base = type(model).__name__
    if f"Attached{base}" != exported.class_name:
        raise PlanError(f"{source.path} names no class of transformers that has its tensors; expected {base}")
    places = describe_places(model, attachment.info.form, dict(attachment.info.config))
    added = attach(model, attachment, source.content, attached.ref)
    tensors = stored_tensors(model, dict.fromkeys([*added.names, *attachment.info.replaced]), source)
    with make_folder(out) as folder:
        copy_sidecars(source, folder)
        save_quietly(model, folder, tensors)
        config = read_json(folder / CONFIG)
        config |= {"architectures": [exported.class_name], "attachment": places}
        config["auto_map"] = {exported.auto: f"{Path(CODE).stem}.{exported.class_name}"}
        replace_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        replace_file(folder / CODE, write_code(base)[1].encode())
        lock_written(folder, request, asdict(exported))
