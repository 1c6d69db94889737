"""The kind of a file by its first bytes: people save archives under any name, and servers send pages in place of files.

`kind_of` returns SAFETENSORS, ZIP or PICKLE, which may hold a state dict; a key of OTHERS; or "" for all else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mergekit_lfm.store.files import name_file, open_regular

HEAD = 512  # bytes that suffice: tar has its mark at byte 257
SAFETENSORS, ZIP, PICKLE = "a safetensors file", "a zip archive", "a pickle"
POINTER, PAGE = "a git-lfs pointer", "an HTML or XML page"
# The kinds that hold no tensors for us -> what to do instead.
OTHERS = {
    POINTER: "run `git lfs pull` in its repository",
    PAGE: "download the file again",
    "a GGUF file": "merge the safetensors files that it was made from, then convert the result",
    "a GGML file": "merge the safetensors files that it was made from, then convert the result",
    "an HDF5 file": "save the weights as safetensors first, in transformers by from_pretrained(..., from_tf=True)",
    "an ONNX file": "merge the PyTorch model that it was exported from, then export the result",
    "a TFLite file": "merge the model that it was converted from, then convert the result",
    "an array of NumPy": "save the weights as safetensors first",
    "a gzip archive": "unpack it first",
    "a tar archive": "unpack it first",
}
_BEGINNINGS = {
    b"PK\3\4": ZIP,
    b"version https://git-lfs": POINTER,
    b"GGUF": "a GGUF file",
    b"lmgg": "a GGML file",
    b"fmgg": "a GGML file",
    b"tjgg": "a GGML file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "an array of NumPy",
    b"\x1f\x8b": "a gzip archive",
}
# Vocabularies may begin with "<", too. Stores in the cloud tell errors in XML.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html\b|<\?xml[^>]*>\s*<Error>)", re.IGNORECASE)
_MARKS = {(4, b"TFL3"): "a TFLite file", (257, b"ustar"): "a tar archive"}


def kind_of(head: bytes) -> str:
    """The kind of a file that begins with `head`, its first HEAD bytes or more."""
    if head[4:9] == b"\0\0\0\0{":  # the length of a header, and its first byte: first, as a length may look like a mark
        return SAFETENSORS
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    for (start, mark), kind in _MARKS.items():
        if head[start : start + len(mark)] == mark:
            return kind
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    if _PAGE.match(head):
        return PAGE
    # protobuf: the field `ir_version`, a small number, then another field of the model
    if (
        head[:1] == b"\x08"
        and 0 < int.from_bytes(head[1:2], "little") < 32
        and head[2:3] in (b"\x12", b"\x3a", b"\x42")
    ):
        return "an ONNX file"
    return ""


def head_of(path: Path) -> bytes:
    """The first HEAD bytes of a regular file."""
    with name_file(path), os.fdopen(open_regular(path), "rb") as file:
        return file.read(HEAD)
