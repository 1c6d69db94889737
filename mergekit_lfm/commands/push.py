"""`push`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command, transfers


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm push merged/quickstart me/quickstart --private
  mergekit-lfm push merged/quickstart me/quickstart --verify
  mergekit-lfm push merged/quickstart s3://models/quickstart""",
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that exists and is public.")
@click.option("--overwrite", is_flag=True, help="Replace weights in REPO even if they are not from an earlier push.")
@click.option("--replace-card", is_flag=True, help="Replace the model card, even if it was edited on the Hub.")
@click.option("-m", "--message", help="The message of the commit. [default: the method of the merge]")
@click.option("--verify", is_flag=True, help="Download the pushed model again and compare it with its lock.")
@options.output
@click.pass_obj
def push(
    console: Console,
    /,
    folder: Path,
    repo: str,
    private: bool,
    overwrite: bool,
    replace_card: bool,
    message: str | None,
    verify: bool,
) -> None:
    """Push the model in DIR to the repository REPO (org/name) on the Hub, in one commit, or into a bucket.

    The repository is made if it does not exist. Files that are there already are not sent again; those of an earlier
    push that DIR no longer has are deleted. A model card that was edited on the Hub is kept. The token is HF_TOKEN, or
    that of `hf auth login`. A push that fails leaves the repository as it was. Into a bucket
    (s3://bucket/path, gs://, az://) the lock goes last, so that a place with a lock holds all of the model.
    """
    from mergekit_lfm.api.push import push as push_folder
    from mergekit_lfm.commands.show.outcomes import outcome_data
    from mergekit_lfm.commands.show.plans import push_data, push_text

    with transfers(hidden=console.hidden):
        outcome = push_folder(
            folder,
            repo,
            private=private,
            overwrite=overwrite,
            replace_card=replace_card,
            message=message,
            pull_back=verify,
            progress=console.progress,
        )
    pushed = outcome.result
    console.conclude(outcome_data(outcome) | push_data(pushed), lambda: push_text(pushed), path=pushed.url)
