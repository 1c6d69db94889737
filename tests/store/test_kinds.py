"""A file is what its first bytes say, under any name; an index says which shard holds a tensor."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, run
from models import save_checkpoint
from safetensors.torch import load_file, save, save_file

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.kinds import SAFETENSORS, kind_of
from mergekit_lfm.store.tensors import TensorSpec, encode_header

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("tensors")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FOREIGN = {
    "a GGUF file": b"GGUF" + (3).to_bytes(4, "little") + bytes(4000),
    "a GGML file": b"tjgg" + bytes(4000),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(4000),
    "an ONNX file": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(4000),
    "a TFLite file": b"\x1c\0\0\0TFL3" + bytes(4000),
    "an array of NumPy": b"\x93NUMPY\x01\0v\0{'descr': '<f4'}" + bytes(400),
    "a gzip archive": gzip.compress(b"x" * 1000),
    "a tar archive": tar_of(b"x" * 1000),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4194304\n",
    "an HTML or XML page": b"\n<!doctype HTML>\n<html><body>Sign in</body></html>",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_called_by_its_name(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(FormatError, match=f"weights{suffix}: this is {kind}, not the weights; "):
        open_checkpoint(path)


def test_a_folder_without_weights_lists_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(FOREIGN["a GGUF file"])
    with pytest.raises(FormatError, match=r"holds no model: .* but model-q4\.gguf, a GGUF file; merge the safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("beginning", [b"GGUF", b"PK\3\4", b"\x80\x02", b"\x08\x08\x12", b"\x1f\x8b", b"<html"])
def test_no_length_of_a_header_is_taken_for_a_mark(beginning: bytes) -> None:
    """A header's length may begin with the bytes of any mark of up to four bytes."""
    head = beginning[:4].ljust(4, b"\0") + b"\0\0\0\0" + b'{"a":{"dtype":"F32"'
    assert kind_of(head) == SAFETENSORS


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth.tar", "model.th", "weights", "model.safetensors"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickles"])
def test_archives_are_read_under_any_name(name: str, old: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=not old)
    model = open_checkpoint(tmp_path / name)
    assert model.keys() == TENSORS.keys()
    assert all(torch.equal(model.read(key).reshape(value.shape), value) for key, value in TENSORS.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x"])
def test_safetensors_are_read_under_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(save(TENSORS))
    model = open_checkpoint(tmp_path / name)
    assert all(torch.equal(model.read(key).reshape(value.shape), value) for key, value in TENSORS.items())


def test_links_are_followed_before_the_kind_is_told(tmp_path: Path) -> None:
    """As in the Hub's cache, where a file's name is its digest, and its name in the model a link."""
    torch.save(TENSORS, tmp_path / "0123abcd")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../0123abcd")
    assert open_checkpoint(tmp_path / "m").keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model-00001-of-00002.safetensors"])
def test_a_link_to_nothing_is_named(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "m", TENSORS, {}, shards=2 if "-" in name else 1)
    (model / name).unlink()
    (model / name).symlink_to("../blobs/0123")
    with pytest.raises(FormatError, match=rf"{name} is a link to \.\./blobs/0123, which is not there"):
        _ = open_checkpoint(model).config


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Net()), tmp_path / "m.pt")
    with pytest.raises(FormatError, match=r"m\.pt is a TorchScript archive, which holds a program"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_zip_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(FormatError, match=r"m\.ckpt is a zip archive without data\.pkl"):
        open_checkpoint(tmp_path / "m.ckpt")


def test_the_warnings_of_torch_stay_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its loader warns of, such as of classes of an older version."""
    real = torch.load

    def load(*args: Any, **options: Any) -> Any:
        warnings.warn("TypedStorage is deprecated", UserWarning, stacklevel=2)
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    torch.save({"a": torch.ones(2, 3).T}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert open_checkpoint(tmp_path / "m.bin")["a"].shape == (3, 2)
    assert not seen


# ------------------------------------------------------------------ an index


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "weights.index.json", "x.safetensors.index.json"])
def test_the_index_decides_which_shard_holds_a_tensor(index: str, tmp_path: Path) -> None:
    model, right = tmp_path / "m", torch.full((3,), 2.0)
    model.mkdir()
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, model / "one.safetensors")
    save_file({"a": right}, model / "two.safetensors")
    weight_map = {"a": "two.safetensors", "b": "one.safetensors"}
    (model / index).write_text(json.dumps({"weight_map": weight_map}))
    (model / "other.index.json").write_text('{"rows": 3}')  # of something else, such as a datastore
    opened = open_checkpoint(model)
    assert torch.equal(opened.read("a"), right) and list(opened.dropped) == ["a"]
    out = Path(merge({"merge_method": "passthrough", "models": [{"model": str(model)}]}, tmp_path / "out"))
    assert torch.equal(open_checkpoint(out).read("a"), right) and (out / "other.index.json").exists()
    assert answer(run("verify", str(out), "--json"))["good"]


def test_shards_of_two_names_for_one_tensor_without_a_word_of_the_index_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    for name in ("one", "two"):
        save_file({"a": torch.zeros(3), name: torch.ones(1)}, model / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in ("one", "two")}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=r"a is in one\.safetensors and in two\.safetensors"):
        open_checkpoint(model)


# ------------------------------------------------------------------ nested state dicts

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
NAMED = {"optimizer_state": {"a": {"exp_avg": torch.ones(2, 3)}}}
WRAPPED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "lightning": (
        {"epoch": 3, "state_dict": TENSORS, "optimizer_states": [OPTIMIZER], "callbacks": {"best": torch.ones(3)}},
        "state_dict",
        {"epoch", "optimizer_states", "callbacks"},
    ),
    "any name": ({"step": 10, "params_ema": TENSORS, "optimizer": OPTIMIZER}, "params_ema", {"step", "optimizer"}),
    "best accuracy": ({"net": TENSORS, "best_acc": torch.tensor(0.9)}, "net", {"best_acc"}),
    "two levels": ({"a.b": {"weights": TENSORS, "lr": 0.1}, **NAMED}, "a.b.weights", {"a.b.lr", "optimizer_state"}),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickles"])
@pytest.mark.parametrize("case", WRAPPED)
def test_the_only_dictionary_of_tensors_is_taken(case: str, old: bool, tmp_path: Path) -> None:
    content, address, beside = WRAPPED[case]
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not old)
    model = open_checkpoint(tmp_path / "m.ckpt")
    assert model.keys() == TENSORS.keys()
    assert all(torch.equal(model.read(key).reshape(value.shape), value) for key, value in TENSORS.items())
    assert (model.files[0].address, set(model.files[0].beside)) == (address, beside)


def test_one_of_several_state_dicts_is_named_by_its_keys(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in TENSORS.items()}
    torch.save({"model": TENSORS, "ema": {"shadow": other}, "epoch": 1}, tmp_path / "m.ckpt")
    with pytest.raises(FormatError, match=r"2 dictionaries of tensors; name the model's: m.ckpt#model, m.ckpt#ema.sha"):
        open_checkpoint(tmp_path / "m.ckpt")
    models = [open_checkpoint(f"{tmp_path / 'm.ckpt'}#{address}") for address in ("model", "ema.shadow")]
    assert [float(model.read("b")[0]) for model in models] == [1.0, 2.0]
    assert models[0].content != models[1].content
    with pytest.raises(FormatError, match=r"holds no 'ema.other', expected m.ckpt#model, m.ckpt#ema.shadow"):
        open_checkpoint(f"{tmp_path / 'm.ckpt'}#ema.other")
    save_file(TENSORS, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"a safetensors file has no parts with names; remove #model"):
        open_checkpoint(f"{tmp_path / 'm.safetensors'}#model")


def test_a_dictionary_that_is_in_itself_ends_the_search(tmp_path: Path) -> None:
    content: dict[str, Any] = {"net": TENSORS}
    content["self"] = content
    torch.save(content, tmp_path / "m.ckpt")
    assert open_checkpoint(tmp_path / "m.ckpt").keys() == TENSORS.keys()


def test_a_merge_names_the_rest_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": TENSORS, "ema": TENSORS, "optimizer": OPTIMIZER, "epoch": 3}, "m.ckpt")
    Path("r.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: 'm.ckpt#net'}, {model: 'm.ckpt#ema'}]\n"
    )
    label, why = "m.ckpt#net", "beside the tensors under net"
    said = run("plan", "r.yaml").stdout
    assert f"read: {label}: the tensors under net of m.ckpt\n" in said
    assert f"left behind: {label}: m.ckpt#ema, m.ckpt#optimizer, m.ckpt#epoch: {why}\n" in said
    entries = answer(run("plan", "r.yaml", "--json"))["left_behind"]
    assert {"model": label, "file": "m.ckpt#epoch", "reason": why} in entries
    with pytest.warns(Finding) as seen:
        out = Path(merge("r.yaml", "out"))
    line = f"{label}: m.ckpt#ema, m.ckpt#optimizer, m.ckpt#epoch were left behind: {why}"
    assert line in [str(warning.message) for warning in seen]
    assert torch.equal(load_file(out / "m.safetensors")["a"], TENSORS["a"])


def test_a_header_of_the_length_that_begins_as_a_zip_archive_is_read(tmp_path: Path) -> None:
    """The encoder pads headers to any length modulo 4096, so 0x504b, the mark of zip, can come first."""
    raw, _ = encode_header([TensorSpec("a", (1,), "float32")], {}, 0x4B50 % 4096 + 8)
    (tmp_path / "m.bin").write_bytes(raw + bytes(4))
    assert open_checkpoint(tmp_path / "m.bin")["a"].shape == (1,)
