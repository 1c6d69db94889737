"""Addresses of models in buckets: s3://bucket/path, gs://bucket/path, az://account/container/path."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ADDRESS = re.compile(r"(?P<scheme>s3|gs|az)://(?P<bucket>[\w.-]+)/(?P<path>[^?#]+)", re.ASCII)
FORMS = "s3://bucket/path, gs://bucket/path or az://account/container/path"


@dataclass(frozen=True, slots=True)
class BucketName:
    """A folder in a bucket, or a file. path: without a slash at its ends."""

    scheme: str
    bucket: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"

    @property
    def last(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


def bucket_name(text: str) -> BucketName | None:
    """The place that an address names; None for any other text."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    path = match["path"].strip("/")
    parts = path.split("/")
    if not path.isprintable() or not all(parts) or {".", ".."} & {*parts}:
        return None
    if match["scheme"] == "az" and len(parts) < 2:
        return None
    return BucketName(match["scheme"], match["bucket"], path)


def is_address(text: str) -> bool:
    """True for a text that begins as an address does."""
    return text.startswith(("s3://", "gs://", "az://"))
