"""Reading: safetensors headers as the official library reads them, and .bin and .pt files as inputs."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import save_model
from helpers_merges import LINEAR, Tensors, load_all, write_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.tensors import CODES, TensorSpec, encode_header, parse_header, read_header

# ------------------------------------------------------------------ headers

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(set(CODES) - {"float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"}))
specs = st.lists(st.builds(TensorSpec, names, shapes, dtypes), max_size=12, unique_by=lambda spec: spec.name)
metadata = st.dictionaries(names, names, max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    specs.filter(lambda found: all(s.name != "__metadata__" for s in found)), metadata, st.none() | st.integers(0, 4095)
)
def test_header_round_trip(tensors: list[TensorSpec], metadata: dict[str, str], start: int | None) -> None:
    """read_header and the safetensors library read the output of encode_header back: order, offsets, metadata."""
    raw, offsets = encode_header(tensors, metadata, start)
    assert len(raw) % (8 if start is None else 4096) == (start or 0)
    nbytes = sum(spec.nbytes for spec in tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(raw + bytes(nbytes))
        header = read_header(path)
        with safe_open(path, "pt") as official:
            assert set(official.keys()) == {spec.name for spec in tensors}
            assert {name: tuple(official.get_tensor(name).shape) for name in official.keys()} == {  # noqa: SIM118
                spec.name: spec.shape for spec in tensors
            }
            assert (official.metadata() or {}) == metadata
    assert {spec for spec, _ in header.tensors.values()} == set(tensors)
    assert [name for name, (spec, _) in header.tensors.items() if spec.numel] == [s.name for s in tensors if s.numel]
    assert {name: offset for name, (_, offset) in header.tensors.items()} == offsets
    assert header.metadata == metadata
    assert header.data_start == len(raw)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "I4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
offsets = st.lists(st.integers(-1, 16) | json_values, min_size=1, max_size=3)
damaged = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BF16", "I4"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | json_values, max_size=2) | json_values,
        "data_offsets": offsets | json_values,
    },
)
headers = st.dictionaries(st.sampled_from(["x", "y", "__metadata__"]), damaged | json_values, max_size=3) | json_values


@settings(max_examples=400, deadline=None, derandomize=True)
@given(headers, st.integers(0, 16))
def test_damaged_headers_are_refused_as_the_library_refuses_them(header: Any, nbytes: int) -> None:
    """For any JSON: FormatError if the safetensors library raises an error, else the same tensors."""
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
        try:
            with safe_open(path, "pt") as official:
                expected = {name: tuple(official.get_slice(name).get_shape()) for name in official.keys()}  # noqa: SIM118
        except Exception:
            with pytest.raises(FormatError, match=r"x\.safetensors"):
                read_header(path)
            return
        assert {name: spec.shape for name, (spec, _) in read_header(path).tensors.items()} == expected


numbers = st.sampled_from(["0", "-0", "1", "4", "2.0", "true", "1e0", "4611686018427387904", "9223372036854775807"])
numbers |= st.sampled_from(["9223372036854775808", "18446744073709551615", "18446744073709551616", "1e999", "NaN"])
values = numbers | st.sampled_from(
    ['"a"', '"\\ud800"', '"\\u0000"', "null", "[" * 126 + "]" * 126, "[" * 99 + "]" * 99]
)
entries = st.builds(
    '{{"dtype":{},"shape":[{}],"data_offsets":[{}]{}}}'.format,
    st.sampled_from(['"U8"', '"F64"', '"BOOL"', "null"]),
    st.lists(numbers, max_size=4).map(",".join),
    st.sampled_from(["0,0", "0,1", "0,8", "0,4", "-0,0", "0,true", "0,1.0"]),
    st.just("") | values.map(',"more":{}'.format) | st.just(',"dtype":"U8"'),
)
members = st.builds('"{}":{}'.format, st.sampled_from(["x", "y", "__metadata__", "\\ud800"]), entries | values)
texts = st.lists(members, max_size=3).map(lambda found: f"{{{','.join(found)}}}")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.tuples(st.sampled_from(["", " ", "\ufeff"]), texts, st.sampled_from(["", " ", ","])).map("".join))
@example('{"x":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}')
@example('{"x":{"dtype":"U8","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}')
@example('{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1e999}}')
@example('{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":"\\ud800"}}')
@example('{"__metadata__":{"a":"\\ud800"}}')
@example('{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":' + "[" * 126 + "]" * 126 + "}}")
def test_every_accepted_header_is_accepted_by_the_library(text: str) -> None:
    nbytes = 8 if "0,8" in text else 1 if "0,1" in text else 0
    for raw in (text.encode(), text.encode("utf-16-le")):
        content = struct.pack("<Q", len(raw)) + raw + bytes(nbytes)
        with suppress(FormatError):
            found = parse_header(Path("x.safetensors"), content, len(content))
            assert {name: list(spec.shape) for name, (spec, _) in found.tensors.items()} == {
                name: entry["shape"] for name, entry in deserialize(content)
            }


@pytest.mark.parametrize("size", ["true", "1.0", "-1", "9223372036854775808,0", '"1"', "null"])
def test_sizes_are_whole_numbers_below_2_to_the_63(size: str) -> None:
    content = header_of(f'{{"x":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,1]}}}}') + b"0"
    with pytest.raises(FormatError, match=r"x\.safetensors: x "):
        parse_header(Path("x.safetensors"), content, len(content))


def header_of(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def entry_of(shape: Iterable[str], dtype: str = "U8") -> str:
    return f'{{"x":{{"dtype":"{dtype}","shape":[{",".join(shape)}],"data_offsets":[0,2]}}}}'


HUGE = {
    "a key repeated": "{" + ",".join(['"x":1', *(f'"k{n}":1' for n in range(100_000)), '"x":1']) + "}",
    "sizes": entry_of(["9223372036854775807"] * 200_000),
    "ones": entry_of(["1"] * 200_000),
    "no entry": f'{{"x":[{",".join(["1"] * 200_000)}]}}',
    "a name of a dtype": entry_of([], "F" * 200_000),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_large_headers_are_refused_in_linear_time_with_a_short_message(text: str) -> None:
    """A quadratic check takes minutes here."""
    raw = header_of(text)
    with pytest.raises(FormatError, match=r"x\.safetensors") as refused:
        parse_header(Path("x.safetensors"), raw, len(raw))
    assert len(str(refused.value)) < 500


def test_a_tensor_of_the_metadatas_name_is_not_written() -> None:
    with pytest.raises(FormatError, match="a tensor is named __metadata__"):
        encode_header([TensorSpec("__metadata__", (1,), "uint8")], {})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=80))
def test_any_bytes_are_refused(content: bytes) -> None:
    """Random bytes are not a safetensors file; read_header raises FormatError and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.safetensors"):
            read_header(path)


# ------------------------------------------------------------------ .bin and .pt as inputs


def save_bin(folder: Path, tensors: Tensors, *, shards: int = 1, legacy: bool = False) -> None:
    """The model's folder with its weights as torch.save writes them."""
    save_model(folder, {})
    (folder / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    files = ["pytorch_model.bin"]
    if shards > 1:
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)


def odd_tensors(seed: int) -> Tensors:
    """Tensors of real state dicts: transposed, sliced, tied, expanded, empty, a parameter, a scalar, a buffer."""
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(40, 24, generator=random)
    return {
        "embed.weight": table,
        "head.weight": table,  # the same storage
        "transposed.weight": torch.randn(24, 40, generator=random).t(),
        "rows.weight": torch.randn(50, 8, generator=random)[7:31],  # a view that starts inside its storage
        "columns.weight": torch.randn(10, 20, generator=random)[:, 3:9],
        "expanded.weight": torch.randn(1, 12, generator=random).expand(5, 12),
        "parameter.weight": torch.nn.Parameter(torch.randn(6, 6, generator=random)),
        "half.weight": torch.randn(9, generator=random).bfloat16(),
        "double.weight": torch.randn(9, generator=random).double(),
        "scalar": torch.randn((), generator=random),
        "position_ids": torch.arange(16)[None],
        "empty.weight": torch.zeros(0, 4),
        "model.layers.0.flag": torch.tensor([True, False]),
    }


BINS: dict[str, dict[str, Any]] = {"single": {}, "sharded": {"shards": 3}, "legacy": {"legacy": True}}


@pytest.mark.parametrize("form", BINS.values(), ids=BINS)
def test_bin_files_give_the_same_bytes_as_safetensors(tmp_path: Path, form: dict[str, Any]) -> None:
    loose, tidy = tmp_path / "loose", tmp_path / "tidy"
    for name, seed in (("a", 1), ("b", 2)):
        tensors = odd_tensors(seed)
        save_bin(loose / name, tensors, **form)
        save_model(tidy / name, {key: tensor.detach().clone() for key, tensor in tensors.items()})
    assert sorted(p.suffix for p in (loose / "a").iterdir()).count(".safetensors") == 0
    found = load_all(Path(merge(write_recipe(loose, LINEAR), loose / "out")))
    expected = load_all(Path(merge(write_recipe(tidy, LINEAR), tidy / "out")))
    assert found.keys() == expected.keys() == odd_tensors(1).keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    locks = [json.loads((folder / "out" / "merge.lock.json").read_text()) for folder in (loose, tidy)]
    assert digests(locks[0]) == digests(locks[1])


def digests(lock: dict[str, Any]) -> dict[str, Any]:
    """Tensor name -> the lock's record of its bytes."""
    return dict(lock["tensors"])


def test_bin_and_safetensors_in_one_merge(tmp_path: Path) -> None:
    a, b = odd_tensors(1), odd_tensors(2)
    save_bin(tmp_path / "a", a)
    save_model(tmp_path / "b", {key: tensor.detach().clone() for key, tensor in b.items()})
    found = load_all(Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out")))
    torch.testing.assert_close(found["transposed.weight"], (a["transposed.weight"] + 3 * b["transposed.weight"]) / 4)
    assert torch.equal(found["position_ids"], a["position_ids"])
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("form", [*BINS.values(), {"suffix": ".pt"}], ids=[*BINS, "one .pt file"])
def test_reading_a_bin_file_by_ranges(tmp_path: Path, form: dict[str, Any]) -> None:
    tensors = odd_tensors(1)
    path = tmp_path / "a"
    if "suffix" in form:
        path = tmp_path / "a.pt"
        torch.save({"state_dict": tensors}, path)
    else:
        save_bin(path, tensors, **form)
    opened = open_checkpoint(path)
    assert set(opened) == set(tensors)
    for name, tensor in tensors.items():
        assert opened[name].shape == tuple(tensor.shape)
        flat = tensor.detach().reshape(-1)
        assert torch.equal(opened.read(name), flat)
        assert torch.equal(opened.read(name, 2, 7), flat[2:7])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_changes_before_its_first_read_is_refused(tmp_path: Path, suffix: str, change: str) -> None:
    """The header was read when the merge was planned; the data may be read hours later."""
    path = save_model(tmp_path / "a", {"x": torch.ones(4)}) / "model.safetensors"
    if suffix == ".pt":
        path = tmp_path / "a.pt"
        torch.save({"x": torch.ones(4)}, path)
    opened = open_checkpoint(path)
    if change == "size":
        path.write_bytes(path.read_bytes() + b"0")
    else:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(FormatError, match=r"was changed since the merge was planned"):
        opened.read("x")


def test_files_whose_tensors_are_not_byte_ranges_say_so(tmp_path: Path) -> None:
    for name, form in {"plain": {}, **BINS}.items():
        save_bin(tmp_path / name, {"x": torch.ones(4, 3), "y": torch.ones(2)}, **form)
    torch.save({"x": torch.ones(4, 3).t()}, tmp_path / "strided.pt")
    save_model(tmp_path / "tidy", {"x": torch.ones(4)})
    found = {path.name: {f.fallback for f in open_checkpoint(path).files} for path in tmp_path.iterdir()}
    by_range = {name: {False} for name in ("plain", "single", "sharded", "tidy")}
    assert found == {**by_range, "legacy": {True}, "strided.pt": {True}}


# ------------------------------------------------------------------ strided tensors


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A view of a tensor: axes in any order, with steps, offsets, and some repeated without being stored."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    tensor = torch.arange(2 ** len(shape) * torch.Size(shape).numel()).reshape([2 * n for n in shape])
    tensor = tensor[tuple(slice(draw(st.integers(0, 1)), None, step) for step in steps)]
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    repeated = tensor.unsqueeze(axis := draw(st.integers(0, len(shape))))
    return repeated.expand([draw(st.integers(1, 3)) if i == axis else -1 for i in range(repeated.dim())])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "strided.bin"])
def test_several_tensors_are_read_one_after_another(tmp_path: Path, name: str) -> None:
    """In any order, with and without others between them."""
    tensors = {f"t{i}": torch.arange(i * 10, i * 10 + 2 * i).view(i, 2) for i in range(1, 5)}
    if name == "model.safetensors":
        save_file(tensors, tmp_path / name)
    else:
        torch.save({key: x.T if name == "strided.bin" else x for key, x in tensors.items()}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    for keys in (["t1", "t2", "t3"], ["t4", "t2", "t1", "t3"], ["t2"], []):
        into = bytearray(sum(checkpoint[key].nbytes for key in keys))
        checkpoint.read_all_into(keys, memoryview(into))
        stored = [tensors[key].T if name == "strided.bin" else tensors[key] for key in keys]
        assert bytes(into) == b"".join(x.contiguous().numpy().tobytes() for x in stored)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strided(), st.sampled_from([torch.int64, torch.bfloat16, torch.bool]), st.data())
def test_every_range_of_a_strided_tensor_reads_as_its_elements(
    tensor: torch.Tensor, dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = (tensor % 251 - 100).to(dtype) if dtype != torch.bool else tensor % 3 == 0
    start, stop = sorted((data.draw(st.integers(0, tensor.numel())), data.draw(st.integers(0, tensor.numel()))))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"x": tensor, "strided": torch.ones(2, 3).t()}, Path(folder) / "a.pt")
        read = open_checkpoint(Path(folder) / "a.pt").read("x", start, stop)
    assert torch.equal(read, tensor.reshape(-1)[start:stop])


class Largest(TorchDispatchMode):
    """The most elements of a tensor for which an operation allocated memory."""

    numel = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6000.0).reshape(60, 100).t(),
        torch.arange(12000.0)[::2],
        torch.arange(6000.0).reshape(2, 30, 100).permute(2, 0, 1),
        torch.arange(6000.0).reshape(60, 100).t()[None],
    ],
    ids=["transposed", "every second", "permuted", "one row"],
)
def test_a_block_of_a_strided_tensor_is_read_without_a_copy_of_the_whole(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"x": tensor}, tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    with Largest() as largest:  # type: ignore[no-untyped-call]
        blocks = [opened.read("x", start, start + 50) for start in range(0, tensor.numel(), 50)]
    assert largest.numel == 50
    assert torch.equal(torch.cat(blocks), tensor.reshape(-1))


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_whose_sign_or_conjugation_is_pending(tmp_path: Path, legacy: bool) -> None:
    """torch saves the bytes as they are, with a mark."""
    number = torch.tensor([1 + 2j, 3 - 4j])
    imaginary, conjugate = number.conj().imag, number.conj()
    assert imaginary.is_neg() and conjugate.is_conj()
    for name, tensor in (("i", imaginary), ("c", conjugate)):
        torch.save({"x": tensor}, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not legacy)
    assert open_checkpoint(tmp_path / "i.pt").read("x").tolist() == [-2, 4]
    assert open_checkpoint(tmp_path / "c.pt").read("x").tolist() == [1 - 2j, 3 + 4j]
