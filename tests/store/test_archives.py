"""Archives and pickles that torch.save does not write are refused: nothing runs, hangs, or takes memory."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mergekit_lfm import open_checkpoint
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.archive import Unreadable, read_archive


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex128), torch.empty(3, device="meta")],
    ids=["sparse", "complex128", "meta"],
)
def test_tensors_that_cannot_be_copied_are_named(tmp_path: Path, tensor: torch.Tensor, legacy: bool) -> None:
    tensors = {"fine": torch.ones(2), "odd.weight": tensor}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"a\.pt: odd\.weight is a"):
        open_checkpoint(tmp_path / "a.pt")


REBUILD = b"}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(%sK\x00%s\x88}tR%ss."
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
ONE = b"K\x01\x85K\x01\x85"  # the shape and the strides (1,)
PICKLES = {
    "no bytes": b"",
    "nothing on the stack": b"0.",
    "a name that is not let in": b"cbuiltins\nprint\n.",
    "no storage": REBUILD % (b"K\x05", ONE, b""),
    "a storage that is not there": REBUILD % (STORAGE, ONE, b""),
    "a storage of short id": REBUILD % (b"X\x01\x00\x00\x00xQ", ONE, b""),
    "a negative shape": REBUILD % (STORAGE, b"J\xff\xff\xff\xff\x85K\x01\x85", b""),
    "strides of another rank": REBUILD % (STORAGE, b"K\x01\x85)", b""),
    "a tensor with a state": REBUILD % (STORAGE, ONE, b"}X\x01\x00\x00\x00aK\x01sb"),
}


@pytest.mark.parametrize("program", PICKLES.values(), ids=PICKLES)
def test_archives_with_any_pickle(tmp_path: Path, program: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    with pytest.raises((Unreadable, FormatError)):
        read_archive(tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt"):
        open_checkpoint(tmp_path / "a.pt")


def archive_of(path: Path, program: bytes, **storages: bytes) -> Path:
    """A zip archive as torch.save writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in storages.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", data)
    return path


def nested(opening: bytes, closing: bytes) -> bytes:
    """A tuple of 2^40 parts, which share their memory; then the opcodes that use it."""
    return opening + b")" + b"q\x00h\x00\x86" * 40 + closing


BOMBS = {
    "a memo of any size": b"\x80\x02}r\xff\xff\xff\x7f0.",
    "bytes of any size": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a text of any size": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b".",
    "a frame of any size": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
    "a key of many parts": nested(b"}", b"K\x01s."),
    "a message of many parts": nested(b"", b"Q."),
    "a name of many parts": nested(b"", b")R."),
    "copies": b"](" + b"2" * 100 + b"e.",
    "a bytearray": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a storage of any size": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    b"J\xff\xff\xff\x7ftQ.",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("legacy", [False, True])
def test_small_pickles_take_no_memory_and_no_time(tmp_path: Path, program: bytes, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    if legacy:
        path.write_bytes(b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"M\xe9\x03." + b"}." + program + b"].")
    else:
        archive_of(path, program)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"a\.pt"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("which", ["data/0", "data.pkl", "version"])
def test_archives_with_compressed_members_are_refused(tmp_path: Path, compression: int, which: str) -> None:
    """torch maps the bytes of such a member as if they were the tensor."""
    torch.save({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for info in plain.infolist():
            kind = compression if info.filename == f"a/{which}" else zipfile.ZIP_STORED
            packed.writestr(info.filename, plain.read(info), compress_type=kind)
    with pytest.raises(FormatError, match=rf"'a/{which}' is compressed or encrypted, expected a stored member"):
        open_checkpoint(tmp_path / "b.pt")


def test_archives_with_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("b/data/0", bytes(40))
    with pytest.raises(FormatError, match="two members have one name"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_archives_with_a_tensor_named_as_metadata_are_refused(tmp_path: Path, legacy: bool) -> None:
    torch.save({"__metadata__": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match="one is named __metadata__"):
        open_checkpoint(tmp_path / "a.pt")


def test_the_rest_of_a_pickle_is_checked_after_a_tensor_that_only_torch_can_make(tmp_path: Path) -> None:
    odd = (REBUILD % (STORAGE, b"J\xff\xff\xff\xff\x85K\x01\x85", b""))[:-1]
    archive_of(tmp_path / "a.pt", odd + BOMBS["a key of many parts"])
    with pytest.raises(FormatError, match="a key that is not a text or number"):
        read_archive(tmp_path / "a.pt")


def test_a_size_that_is_true_is_refused(tmp_path: Path) -> None:
    archive_of(tmp_path / "a.pt", REBUILD % (STORAGE, b"\x88\x85\x88\x85", b""), _0=bytes(4))
    with pytest.raises(Unreadable):
        read_archive(tmp_path / "a.pt")


SHAPES = {"x": (300,), "y": (2, 2)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    tensors = OrderedDict(x=torch.arange(300), y=torch.nn.Parameter(torch.ones(2, 2)))
    torch.save({"state_dict": tensors, "step": 70_000, "rate": 0.5}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert {name: spec.shape for name, (spec, _) in read_archive(tmp_path / "a.pt").tensors.items()} == {
        "x": (300,),
        "y": (2, 2),
    }


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    """Whichever byte is changed: FormatError, or a checkpoint whose tensors can be read."""
    torch.save({"x": torch.arange(5.0), "y": torch.arange(4)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            opened = open_checkpoint(tmp_path / "a.pt")
            assert all(len(opened.read(name)) == spec.numel for name, spec in opened.items())
        except FormatError as error:
            assert "a.pt" in str(error)
            refused += 1
    assert refused > 100


def test_a_tensor_that_ends_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """A storage of one float: a tensor of one fits from its start on, and not from its second element on."""
    program = REBUILD % (STORAGE, ONE, b"")
    for first in (0, 1):
        with zipfile.ZipFile(tmp_path / f"{first}.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program.replace(b"QK\x00", b"QK" + bytes([first])))
            archive.writestr("archive/data/0", struct.pack("<f", 1.5))
    assert open_checkpoint(tmp_path / "0.pt").read("x").tolist() == [1.5]
    with pytest.raises(FormatError, match="x reaches beyond its storage"):
        open_checkpoint(tmp_path / "1.pt")
