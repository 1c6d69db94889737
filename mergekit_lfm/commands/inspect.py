"""`inspect` and `methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import as_json
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from mergekit_lfm.api.inspect import Artifact


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm inspect merged/quickstart
  mergekit-lfm inspect model-00001-of-00002.safetensors --json
  mergekit-lfm inspect stats.safetensors
  mergekit-lfm inspect transform.safetensors
  mergekit-lfm inspect my-lora
  mergekit-lfm inspect models/a+my-lora
  mergekit-lfm inspect Qwen/Qwen3-0.6B""",
)
@click.argument("path")
@click.option(
    "--content",
    is_flag=True,
    help="Also print the digest of names and data by which statistics and patches name a model; this reads everything.",
)
@as_json
@click.pass_obj
def inspect(console: Console, /, path: str, content: bool) -> None:
    """List the tensors of a model's folder, of one file, or of a model on the Hub: shapes, dtypes, sizes, totals.

    On the Hub (org/name, org/name@revision) the headers are read there, and no weights are downloaded.
    After the list, a statistics file, a transform, a patch or an adapter of any kind is described: its model, its
    method and its content. MODEL+ADAPTER is the model with the adapter applied.
    """
    from mergekit_lfm.api.inspect import inspect_file
    from mergekit_lfm.commands.show.files import checkpoint_data, checkpoint_text

    inspected = inspect_file(path, content=content).result
    data = checkpoint_data(inspected.checkpoint)
    if content:
        data["content"] = inspected.content
    kind, description, text = _describe(inspected.artifact, inspected.checkpoint.files[0].path)
    if kind:
        data[kind] = description
    console.conclude(data, lambda: "\n\n".join([checkpoint_text(data), *([text] if text else [])]))


def _describe(artifact: Artifact | None, file: Path) -> tuple[str, dict[str, Any], str]:
    """The kind of an artifact, and its description as data and as text; ("", {}, "") without one."""
    if artifact is None:
        return "", {}, ""
    from mergekit_lfm.artifacts.adapter import Adapter
    from mergekit_lfm.artifacts.attachment import Attachment
    from mergekit_lfm.artifacts.statistics import Statistics
    from mergekit_lfm.artifacts.transform import Transform
    from mergekit_lfm.commands.show.attachments import attachment_data, attachment_text
    from mergekit_lfm.commands.show.files import adapter_data, adapter_text, statistics_data, statistics_text
    from mergekit_lfm.commands.show.patches import patch_data, patch_text
    from mergekit_lfm.commands.show.transforms import transform_data, transform_text

    if isinstance(artifact, Statistics):
        data = statistics_data(artifact)
        return "statistics", data, statistics_text(data)
    if isinstance(artifact, Transform):
        data = transform_data(artifact)
        return "transform", data, transform_text(data)
    if isinstance(artifact, Adapter):
        data = adapter_data(artifact)
        return "adapter", data, adapter_text(data)
    if isinstance(artifact, Attachment):
        data = attachment_data(artifact)
        return "attachment", data, attachment_text(data)
    data = {"path": str(file), **patch_data(artifact)}
    return "patch", data, patch_text(data)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm methods
  mergekit-lfm methods ties
  mergekit-lfm methods memit""",
)
@click.argument("name", required=False)
@as_json
@click.pass_obj
def methods(console: Console, /, name: str | None) -> None:
    """List the methods to merge, align, edit, and collect statistics, or describe one: parameters, defaults, source.

    If methods of several kinds have the name, all of them are described.
    """
    from mergekit_lfm.commands.show.methods import method_data, method_text
    from mergekit_lfm.commands.show.terminal import table
    from mergekit_lfm.recipe.foreign import unknown_method
    from mergekit_lfm.recipe.registry import all_methods

    kinds = all_methods()
    known = {method for methods in kinds.values() for method in methods}
    if name is not None and name not in known:
        sentence, words = unknown_method(name, known)
        raise PlanError(sentence, **words)
    chosen = [(kind, m) for kind, methods in kinds.items() for m in methods.values() if name in (None, m.name)]
    data: dict[str, dict[str, Any]] = {kind: {} for kind, _ in chosen}
    for kind, method in chosen:
        data[kind][method.name] = method_data(method)

    def text() -> str:
        if name is not None:
            return "\n\n".join(method_text(method, kind) for kind, method in chosen)
        rows = [(kind, method.name, method.summary) for kind, method in chosen]
        return table([("kind", "method", "what it does"), *rows])

    console.conclude(data, text)
