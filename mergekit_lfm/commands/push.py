"""`push`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lfm.commands.options import as_json, quiet
from mergekit_lfm.commands.shell import Command, transfers


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm push merged/quickstart me/quickstart --private
  mergekit-lfm push merged/quickstart me/quickstart --verify""",
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; one that is there has to be.")
@click.option("--overwrite", is_flag=True, help="Replace weights in REPO that are not of an earlier push.")
@click.option("--replace-card", is_flag=True, help="Replace the model card, even if it was edited on the Hub.")
@click.option("-m", "--message", help="Of the commit. [default: what was merged]")
@click.option("--verify", is_flag=True, help="Download what was pushed again and compare it with its lock.")
@as_json
@quiet
def push(
    folder: Path,
    repo: str,
    private: bool,
    overwrite: bool,
    replace_card: bool,
    message: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Push the model in DIR to the repository REPO (org/name) on the Hub, in one commit.

    The repository is made where there is none. Files that are there already are not sent again; those of an earlier
    push that are no more are deleted. A model card that was edited on the Hub is kept. The token is HF_TOKEN, or what
    `hf auth login` has stored. A push that fails leaves the repository as it was.
    """
    from mergekit_lfm.commands.show.plans import push_data, push_text
    from mergekit_lfm.output.push import push as push_to

    with transfers(hidden=quiet or as_json):
        pushed = push_to(
            folder,
            repo,
            private=private,
            overwrite=overwrite,
            replace_card=replace_card,
            message=message,
            pull_back=verify,
        )
    if as_json:
        click.echo(json.dumps(push_data(pushed)))
        return
    if not quiet:
        click.echo(push_text(pushed), err=True)
    click.echo(pushed.url)
