"""Names of models that are not on this machine, on the Hub or in a bucket, and the models that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.buckets import BucketName, bucket_name
from mergekit_lfm.store.buckets.names import FORMS, is_address
from mergekit_lfm.store.hub import HubName, display_name, hub_name, nearest_name, repository

if TYPE_CHECKING:
    from mergekit_lfm.store.snapshot import Snapshot

Elsewhere = HubName | BucketName
EXPECTED = "a folder, or a model on the Hub as org/name or org/name@revision, or in a bucket as s3://bucket/path"


def name_elsewhere(text: str) -> Elsewhere | None:
    """The model that an address in a bucket, or a name on the Hub, names; None for any other text."""
    return bucket_name(text) or hub_name(text.removeprefix("hf://"))


def shown_name(text: str, folder: Path) -> str:
    """The name for messages of the model that a text named and that is in this folder: its address, or the folder's."""
    name = bucket_name(text)
    return display_name(folder) if name is None else str(name)


def nearest(text: str) -> str:
    """The end of a message about a text that names no model: the form in which it would, "" if none is near."""
    return f"; addresses of buckets have the form {FORMS}" if is_address(text) else nearest_name(text)


def destination(text: str) -> str:
    """`text`, where to push to: the name of a repository on the Hub, or an address. Raises ValueError if it is neither.

    An address is given in its plain form.
    """
    if (name := bucket_name(text)) is not None:
        return str(name)
    if is_address(text):
        raise ValueError(f"found {text!r}, expected an address of the form {FORMS}")
    return repository(text.removeprefix("hf://"))


def find_elsewhere(name: Elsewhere) -> Snapshot:
    """The model in its current state. Raises the errors of `Snapshot.fetch`."""
    if isinstance(name, BucketName):
        from mergekit_lfm.store.buckets.snapshots import find_in_bucket

        return find_in_bucket(name)
    from mergekit_lfm.store.hub.snapshots import find_snapshot

    try:
        return find_snapshot(name)
    except PlanError as error:
        nowhere = str(error).startswith("found no model")
        raise PlanError(f"{name} is not a local folder: {error}" if nowhere else str(error)) from None
    except ConnectionError as error:
        raise ConnectionError(f"{name} is not a local folder, and {error}") from None
