"""`inspect` and `methods`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands.options import as_json
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.store.checkpoint import Checkpoint


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm inspect merged/quickstart
  mergekit-lfm inspect model-00001-of-00002.safetensors --json
  mergekit-lfm inspect stats.safetensors
  mergekit-lfm inspect transform.safetensors
  mergekit-lfm inspect Qwen/Qwen3-0.6B""",
)
@click.argument("path")
@click.option(
    "--content", is_flag=True, help="Also the digest of names and data, as statistics name a model. Reads all."
)
@as_json
def inspect(path: str, content: bool, as_json: bool) -> None:
    """List the tensors of a model's folder, of one file, or of a model on the Hub: shapes, dtypes, sizes, totals.

    On the Hub (org/name, org/name@revision) the headers are read there, and no weights are downloaded.
    Of a statistics file also what it says about itself: its kind, model, data and what it does not cover; of a
    transform its method, models, and what moves how much; of a patch what `patch show` says.
    """
    from mergekit_lfm.commands.show.files import checkpoint_data, checkpoint_text
    from mergekit_lfm.store.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    data = checkpoint_data(checkpoint)
    if content:
        data["content"] = checkpoint.content
    kind, about, text = _about(checkpoint)
    if kind:
        data[kind] = about
    if as_json:
        click.echo(json.dumps(data))
        return
    click.echo(checkpoint_text(data))
    if text:
        click.echo("\n" + text)


def _about(checkpoint: Checkpoint) -> tuple[str, dict[str, Any], str]:
    """What a checkpoint's only file is, whatever its name, and what it says about itself, as data and as text.

    ("", {}, "") where it is a model's.
    """
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.artifacts.statistics import open_statistics
    from mergekit_lfm.artifacts.transform import open_transform
    from mergekit_lfm.commands.show.files import statistics_data, statistics_text
    from mergekit_lfm.commands.show.patches import patch_data, patch_text
    from mergekit_lfm.commands.show.transforms import transform_data, transform_text
    from mergekit_lfm.store.formats import ARCHIVES
    from mergekit_lfm.store.tensors import read_header

    path = checkpoint.files[0].path
    model = len(checkpoint.files) > 1 or path.suffix in ARCHIVES or checkpoint.snapshot is not None
    kind = "" if model else read_header(path).metadata.get("lfm.kind")
    if kind == "statistics":
        about = statistics_data(open_statistics(path))
        return kind, about, statistics_text(about)
    if kind == "transform":
        about = transform_data(open_transform(path))
        return kind, about, transform_text(about)
    if kind == "patch":
        about = {"path": str(path), **patch_data(open_patch(path))}
        return kind, about, patch_text(about)
    return "", {}, ""


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm methods
  mergekit-lfm methods ties""",
)
@click.argument("name", required=False)
@as_json
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or say all about one: parameters, defaults, source."""
    from mergekit_lfm.commands.show.methods import method_data, method_text
    from mergekit_lfm.commands.show.terminal import table
    from mergekit_lfm.errors import did_you_mean
    from mergekit_lfm.methods import METHODS

    if name is not None and name not in METHODS:
        raise PlanError(f"there is no method {name!r}, {did_you_mean(name, METHODS)}")
    chosen = list(METHODS.values()) if name is None else [METHODS[name]]
    if as_json:
        data = {method.name: method_data(method) for method in chosen}
        click.echo(json.dumps(data if name is None else data[name]))
    elif name is not None:
        click.echo(method_text(chosen[0]))
    else:
        click.echo(table([("method", "what it does"), *((method.name, method.summary) for method in chosen)]))
