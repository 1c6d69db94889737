"""Bad input (files, checkpoints, numbers or a recipe) gives one clear message and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import Forks, output_snapshot, snapshot, write_raw, write_tensors
from helpers_work import EMBED, LINEAR, NORM, PASSTHROUGH, TIES, UP, Work
from safetensors.torch import load_file


@pytest.fixture
def work(tmp_path: Path, cli: Forks) -> Work:
    return Work(tmp_path, cli)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


# ------------------------------------------------------------------ files that are not what they claim to be


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [-1, -5000, 300, 12, 8, 5, 0])
def test_truncated_file(work: Work, keep: int) -> None:
    cut(weights(work.b), keep)
    work.refused("models/b/model.safetensors")


def test_truncated_shard(work: Work) -> None:
    work.save("b", shards=3)
    cut(work.b / "model-00002-of-00003.safetensors", -7)
    work.refused("model-00002-of-00003.safetensors", "truncated")


def test_trailing_bytes(work: Work) -> None:
    with weights(work.b).open("ab") as file:
        file.write(b"\0")
    work.refused("models/b/model.safetensors", "trailing")


def entry(begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[object, int, str]] = {
    "hole": ({"x": entry(0, 8), "y": entry(12, 20)}, 20, "hole"),
    "hole at the start": ({"x": entry(4, 12)}, 12, "hole"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, 12, "overlap"),
    "shared range": ({"x": entry(0, 8), "y": entry(0, 8)}, 8, "overlap"),
    "unknown dtype": ({"x": entry(0, 8, "I4")}, 8, "I4"),
    "dtype is a list": ({"x": entry(0, 8) | {"dtype": ["F32"]}}, 8, "dtype"),
    "shape too large": ({"x": entry(0, 8) | {"shape": [3]}}, 8, "x"),
    "shape negative": ({"x": entry(0, 8) | {"shape": [-2]}}, 8, "x"),
    "shape of text": ({"x": entry(0, 8) | {"shape": ["2"]}}, 8, "x"),
    "shape null": ({"x": entry(0, 8) | {"shape": None}}, 8, "x"),
    "offsets reversed": ({"x": entry(0, 8) | {"data_offsets": [8, 0]}}, 8, "x"),
    "offsets fractional": ({"x": entry(0, 8) | {"data_offsets": [0, 8.0]}}, 8, "x"),
    "three offsets": ({"x": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "x"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, 8, "x"),
    "half a character": ({"\ud800": entry(0, 8)}, 8, "JSON"),
    "entry is a number": ({"x": 3}, 0, "x"),
    "metadata of numbers": ({"__metadata__": {"epoch": 3}}, 0, "__metadata__"),
    "a list": ([1, 2], 0, "header"),
}


@pytest.mark.parametrize(("header", "nbytes", "needle"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header(work: Work, header: object, nbytes: int, needle: str) -> None:
    write_raw(weights(work.b), header, bytes(nbytes))
    work.refused("models/b/model.safetensors", needle)


def file_of(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


NOT_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4194304\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n", "HTML"),
    "unfinished output": (b"\xff" * 8 + b'{"x":{}}', "unfinished"),
    "header not JSON": (file_of(b"{not JSON}"), "JSON"),
    "header not UTF-8": (file_of(b'{"\xff\xfe": {}}'), "JSON"),
    "name twice": (file_of(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{}}'), "twice"),
    "nested without end": (file_of(b"[" * 200_000), "JSON"),
}


@pytest.mark.parametrize(("content", "needle"), NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
def test_not_weights(work: Work, content: bytes, needle: str) -> None:
    weights(work.b).write_bytes(content)
    work.refused("models/b/model.safetensors", needle)


def test_missing_shard(work: Work) -> None:
    work.save("b", shards=3)
    (work.b / "model-00002-of-00003.safetensors").unlink()
    work.refused("models/b", "model-00002-of-00003.safetensors")


def test_index_names_a_tensor_that_no_shard_has(work: Work) -> None:
    work.save("b", shards=2)
    index = work.b / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    work.refused("models/b", "model.ghost.weight")


def test_index_that_misplaces_a_tensor_is_corrected(work: Work) -> None:
    """The shards say where a tensor is; a wrong index does no harm and is not copied."""
    work.save("a", shards=2)
    index = work.a / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][EMBED] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert work.run().code == 0
    merged = json.loads((work.folder / "out" / "model.safetensors.index.json").read_text())
    assert EMBED in load_file(work.folder / "out" / merged["weight_map"][EMBED])


def test_weights_beside_an_index_of_other_weights(work: Work) -> None:
    """Two saves into one folder left them: the right one cannot be known."""
    content = weights(work.b).read_bytes()
    work.save("b", shards=2)
    weights(work.b).write_bytes(content)
    work.refused("models/b", "model.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', "{}"])
def test_bad_index(work: Work, text: str) -> None:
    work.save("b", shards=2)
    (work.b / "model.safetensors.index.json").write_text(text)
    work.refused("models/b/model.safetensors.index.json")


def test_index_that_points_elsewhere_writes_nothing_elsewhere(work: Work) -> None:
    work.save("a", shards=2)
    secret = work.folder / "secret.safetensors"
    write_tensors(secret, work.tensors["a"])
    index = work.a / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(work.tensors["a"], "../../secret.safetensors")}))
    before = snapshot(work.folder, times=True)
    ran = work.run()
    assert ran.code in (0, 2)
    after = snapshot(work.folder, times=True)
    assert {name: entry for name, entry in after.items() if name.split("/")[0] != "out"} == before


def test_bad_config(work: Work) -> None:
    (work.a / "config.json").write_text('{"model_type": ')
    work.refused("models/a/config.json")


def test_no_weights(work: Work) -> None:
    weights(work.b).unlink()
    work.refused("models/b", "safetensors")


ADAPTERS = [
    ("adapter_model.safetensors",),
    ("adapter_model.safetensors", "adapter_config.json"),
    ("adapter_config.json",),
]


@pytest.mark.parametrize("names", ADAPTERS, ids="+".join)
def test_an_adapter_is_not_a_model(work: Work, names: tuple[str, ...]) -> None:
    weights(work.b).rename(work.b / names[0])
    for name in names[1:]:
        (work.b / name).write_text("{}")
    work.refused("models/b holds an adapter", "name it with its model, MODEL+")


def test_an_adapter_beside_a_model_is_left_alone(work: Work) -> None:
    shutil.copy(weights(work.b), work.b / "adapter_model.safetensors")
    (work.b / "adapter_config.json").write_text("{}")
    assert work.run().code == 0


def test_no_such_model(work: Work) -> None:
    shutil.rmtree(work.b)
    work.refused("models/b")


def test_a_directory_in_place_of_the_weights(work: Work) -> None:
    weights(work.b).unlink()
    weights(work.b).mkdir()
    work.refused("models/b/model.safetensors")


@pytest.mark.parametrize(
    "file", ["models/b/model.safetensors", "models/a/config.json", "models/a/tokenizer.json", "recipe.yaml"]
)
def test_unreadable_file(work: Work, file: str) -> None:
    work.refused(file, "Permission denied", deny=file, early="tokenizer" not in file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(work: Work) -> None:
    weights(work.b).chmod(0)
    work.refused("models/b/model.safetensors", "Permission denied")
    weights(work.b).chmod(0o644)


def test_read_error_in_the_middle(work: Work) -> None:
    work.refused(
        "models/b/model.safetensors",
        "Input/output error",
        fail="preadv",
        where="models/b",
        error=errno.EIO,
        early=False,
    )
    assert work.run().code == 0


@pytest.mark.parametrize("nth", [1, 15])
@pytest.mark.parametrize("call", ["preadv", "copy_file_range"])
def test_input_that_is_cut_while_it_is_read(work: Work, call: str, nth: int) -> None:
    """As by a download that starts over: the merge stops, and does not wait for bytes that never come."""
    if call == "copy_file_range":
        work.recipe(PASSTHROUGH)
    where = "" if call == "copy_file_range" else "models"
    ran = work.run(fail=call, nth=nth, where=where, shorten=str(weights(work.b)), sync_bytes=1 << 20)
    assert ran.code == 2, ran.err
    assert "models/b/model.safetensors" in ran.err
    assert "changed" in ran.err
    assert not (work.folder / "out").exists()


def test_hostile_pickle_is_not_run(work: Work) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path.touch, (work.folder / "owned",)  # type: ignore[return-value]

    weights(work.b).unlink()
    torch.save({NORM: Hostile()}, work.b / "pytorch_model.bin", pickle_module=pickle)
    work.refused("models/b/pytorch_model.bin")


@pytest.mark.parametrize("keep", [-1, -1000, 2000, 100, 0])
def test_truncated_bin(work: Work, keep: int) -> None:
    weights(work.b).unlink()
    torch.save(work.tensors["b"], work.b / "pytorch_model.bin")
    cut(work.b / "pytorch_model.bin", keep)
    work.refused("models/b/pytorch_model.bin")


# ------------------------------------------------------------------ checkpoints that do not go together


def test_all_missing_tensors_are_named(work: Work) -> None:
    missing = {UP: None, NORM: None, "model.layers.0.self_attn.q_proj.weight": None}
    work.change("b", dict(missing))
    message = work.refused("models/b", *missing)
    assert "lm_head" not in message


def test_all_additional_tensors_are_named(work: Work) -> None:
    more = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(32, dtype=torch.bfloat16) for i in range(2)}
    work.change("b", dict(more))
    work.refused("models/b", *more)


def test_missing_and_additional_and_misshapen_in_one_message(work: Work) -> None:
    work.change("b", {UP: None, "model.rotary.scale": torch.ones(3), NORM: torch.ones(31, dtype=torch.bfloat16)})
    work.refused(UP, "model.rotary.scale", NORM, "31", "32")


def test_all_wrong_shapes_are_named(work: Work) -> None:
    wrong = {
        UP: torch.zeros(32, 64),
        NORM: torch.zeros(1, 32),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(32 * 64),
    }
    work.change("b", {name: tensor.bfloat16() for name, tensor in wrong.items()})
    work.refused("models/b", *wrong, "64, 32", "32, 64", "1, 32", "2048")


def test_many_differences_stay_readable(work: Work) -> None:
    """With a wholly different model the message names many differences, but ends."""
    more = {f"other{i}.weight": torch.zeros(1) for i in range(5000)}
    work.change("b", more | dict.fromkeys(work.tensors["b"]))
    message = work.refused("models/b", "5021")
    assert len(message) < 50_000


@pytest.mark.parametrize("recipe", [LINEAR, TIES], ids=["linear", "ties"])
def test_vocabularies_of_different_size(work: Work, recipe: str) -> None:
    rows = {name: torch.zeros(66, 32, dtype=torch.bfloat16) for name in (EMBED, "lm_head.weight")}
    work.change("b", dict(rows))
    work.recipe(recipe)
    work.refused("models/b", EMBED, "lm_head.weight", "66, 32", "64, 32")


def test_integer_buffers_that_differ(work: Work) -> None:
    work.change("a", {"model.order": torch.arange(8)})
    work.change("b", {"model.order": torch.arange(8).flip(0)})
    work.refused("model.order", "int64", "models/a", "models/b")


def test_integer_buffers_that_are_equal_are_copied(work: Work) -> None:
    for name in "ab":
        work.change(name, {"model.position_ids": torch.arange(8), "model.scale": torch.tensor(3)})
    assert work.run().code == 0
    merged = load_file(work.folder / "out" / "model.safetensors")
    assert torch.equal(merged["model.position_ids"], torch.arange(8))
    assert torch.equal(merged["model.scale"], torch.tensor(3))


def test_float8_is_refused(work: Work) -> None:
    work.change("b", {UP: work.tensors["b"][UP].to(torch.float8_e4m3fn)})
    work.refused("models/b", UP, "float8_e4m3fn")


def test_float8_with_scales_is_refused(work: Work) -> None:
    work.change("b", {UP: work.tensors["b"][UP].to(torch.float8_e4m3fn), UP + "_scale_inv": torch.ones(1, 1)})
    work.refused("models/b", "quantised")


def test_packed_integers_are_refused(work: Work) -> None:
    """Weights quantised to integers are not buffers: equal or not, they cannot be merged."""
    packed = torch.ones(64, 4, dtype=torch.int32)
    for name in "ab":
        work.change(name, {UP: None, UP.replace("weight", "qweight"): packed})
        config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
        (work.folder / "models" / name / "config.json").write_text(json.dumps(config))
    work.refused("models/a", "models/b", "quantised")


# ------------------------------------------------------------------ numbers


CRUMBS = TIES.replace("ties", "breadcrumbs").replace("density: 0.5", "density: 0.5, gamma: 0.1")  # drops the largest


@pytest.mark.parametrize("recipe", [LINEAR, TIES, CRUMBS], ids=["linear", "ties", "dropped"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_finite_input_is_an_error(work: Work, value: str, recipe: str) -> None:
    tensor = work.tensors["b"][UP].clone()
    tensor[3, 5] = float(value)
    work.change("b", {UP: tensor})
    work.recipe(recipe)
    work.refused(UP, "models/b", "--nan warn", early=False)


def test_not_finite_input_as_a_warning(work: Work) -> None:
    """The merge finishes, warns, and records it, both at once and after a refusal."""
    tensor = work.tensors["b"][UP].clone()
    tensor[3, 5] = float("nan")
    work.change("b", {UP: tensor})
    at_once = work.run("--nan", "warn", out="out-2")
    assert at_once.code == 0, at_once.err
    work.refused(UP, early=False)
    ran = work.run("--nan", "warn")
    assert ran.code == 0, ran.err
    for said in (at_once.err, ran.err):
        assert UP in said
        assert "models/b" in said
    assert output_snapshot(work.folder / "out") == output_snapshot(work.folder / "out-2")
    lock = (work.folder / "out" / "merge.lock.json").read_text()
    assert json.loads(lock)["nonfinite"] == [f"{UP} of models/b"]
    merged = load_file(work.folder / "out" / "model.safetensors")
    assert [name for name, t in merged.items() if not t.isfinite().all()] == [UP]
    assert int(merged[UP].isnan().sum()) == 1


def test_several_not_finite_tensors_as_warnings(work: Work) -> None:
    work.change("b", {name: torch.full_like(work.tensors["b"][name], float("inf")) for name in (UP, NORM)})
    ran = work.run("--nan", "warn")
    assert ran.code == 0
    assert UP in ran.err
    assert NORM in ran.err


def test_overflow_of_the_output_is_an_error(work: Work) -> None:
    """Finite in, infinite out: 3 * 30000 does not fit float16."""
    large = torch.full((32,), 30000.0, dtype=torch.float16)
    for name in "ab":
        work.change(name, {NORM: large})
    text = LINEAR.replace("weight: 1", "weight: 3").replace(
        "merge_method: linear", "merge_method: linear\ndtype: float16"
    )
    work.recipe(text + "parameters: {normalize: false}\n")
    work.refused(NORM, early=False)


def test_weights_that_sum_to_zero(work: Work) -> None:
    work.recipe(LINEAR.replace("weight: 3", "weight: -1"))
    work.refused("weight", "normalize")
    work.recipe(LINEAR.replace("weight: 3", "weight: -1") + "parameters: {normalize: false}\n")
    assert work.run().code == 0


def test_weights_that_sum_to_zero_in_one_tensor(work: Work) -> None:
    filtered = "weight: [{filter: layers.1.mlp.up_proj, value: -1}, {value: 3}]"
    work.recipe(LINEAR.replace("weight: 3", filtered))
    work.refused("weight", "normalize", UP)


def test_karcher_has_no_switch_that_takes_weights_which_sum_to_zero(work: Work) -> None:
    work.recipe(LINEAR.replace("linear", "karcher").replace("weight: 1", "weight: 0").replace("weight: 3", "weight: 0"))
    assert "false" not in work.refused("the weights [0.0, 0.0] sum to 0", "give weights with another sum")
    work.recipe(LINEAR.replace("linear", "multislerp").replace("weight: 3", "weight: -1"))
    work.refused("set `normalize_weights: false`")


@pytest.mark.parametrize(
    ("old", "new", "needles"),
    [
        ("linear", "lineer", ("merge_method", "linear")),
        ("weight: 3", "wieght: 3", ("wieght", "weight")),
        ("weight: 3", "weight: heavy", ("weight", "heavy")),
        ("merge_method", "dtype: fp16\nmerge_method", ("dtype", "fp16", "float16")),
        ("models:", "modles:", ("modles", "models")),
        ("merge_method: linear", "", ("merge_method",)),
        ("weight: 3", "weight: {", ("recipe.yaml", "line")),
        ("models/b", "user/model-on-the-hub", ("user/model-on-the-hub",)),
    ],
)
def test_bad_recipe(work: Work, old: str, new: str, needles: tuple[str, ...]) -> None:
    work.recipe(LINEAR.replace(old, new, 1))
    work.refused(*needles)


def test_no_such_recipe(work: Work) -> None:
    (work.folder / "recipe.yaml").unlink()
    work.refused("recipe.yaml")
