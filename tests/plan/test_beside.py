"""Every file of the base model's folder is merged, copied or left behind for a reason; what configs name is there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import files_of, save_checkpoint
from safetensors.torch import load_file, save, save_file

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.card import CARD, OWN_CARD
from mergekit_lfm.output.journal import JOURNAL
from mergekit_lfm.output.lock import LOCK, verify
from mergekit_lfm.output.replace import REPLACED
from mergekit_lfm.output.save import MARK
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store import sidecars

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def model(folder: Path, seed: int = 0, files: Mapping[str, Any] | None = None) -> Path:
    """A model of two tensors with more files: texts, bytes, or JSON."""
    draw = torch.Generator().manual_seed(seed)
    save_checkpoint(folder, {"a": torch.randn(4, generator=draw), "b": torch.ones(2, 2)}, {"model_type": "x"})
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def linear(*models: Path) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "models": [{"model": str(path)} for path in models],
    }


def plan_of(*models: Path) -> Plan:
    return make_plan(Recipe.parse(linear(*models)))


# ------------------------------------------------------------------ the account

NAMES = ["vocab.txt", "bpe.codes", "tekken.json", "x.jinja", "x.py", "token.txt", ".env", "optimizer.pt", "x.gguf", "x"]
NAMES += ["README.md", "merge.lock.json", "pytorch_model.bin", "x.pkl", "x.pyc", "x.index.json", "trainer_state.json"]
FOLDERS = ["", "1_Pooling", "2_Dense", ".git", "original", "a/b", "checkpoint-3", "merge.replaced"]
SECRET = "hf_" + "a" * 34
CONTENTS = [b"", b"text", b"{}", b"\x80\x02}.", b"GGUF" + bytes(60), save({"z": torch.ones(1)}), SECRET.encode()]
CONTENTS += [b'{"weight_map": {"a": "b.safetensors"}}', b"PK\3\4" + bytes(60)]
# A link leads to the weights, to a file of the folder, out of it, to nothing, or to a folder.
LINKS = ["model.safetensors", "config.json", "../outside.txt", "gone", ".", ".env"]

trees = st.dictionaries(
    st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)).map(lambda parts: "/".join(filter(None, parts))),
    st.sampled_from(CONTENTS) | st.sampled_from(LINKS),
    max_size=12,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(trees)
def test_every_file_is_merged_copied_or_left_behind(tree: dict[str, bytes | str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "outside.txt").write_text("private")
        folder = model(Path(place) / "m")
        for name, content in tree.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.symlink_to(os.path.relpath(folder / content, path.parent))
        there = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
        }
        plan = plan_of(folder)
        merged = {file.path.relative_to(folder).as_posix() for file in plan.models[0].files}
        copied, left = {name for name, _ in plan.files}, {name for _, name, _ in plan.left_behind}
        assert sorted([*merged, *copied, *left]) == sorted(there)  # each once
        assert all(why for _, _, why in plan.left_behind)
        assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in copied)
        assert not any(SECRET.encode() in data or b"private" in data for data in plan.contents.values())
        assert not any(part.startswith(".") for name in copied for part in name.split("/"))
        assert not any("x.gguf" in name or "optimizer" in name or name.endswith((".pkl", ".pyc")) for name in copied)


def test_names_of_the_output_itself_are_not_copied() -> None:
    for name in (CARD, OWN_CARD, LOCK, JOURNAL, MARK, f"{REPLACED}/config.json"):
        assert sidecars.OWN.search(name), name
    assert not sidecars.OWN.search("original/README.md")


@pytest.mark.parametrize(
    "name",
    [
        "tekken.json",
        "bpe.codes",
        "entity_vocab.json",
        "vocab-src.json",
        "additional_chat_templates/tool_use.jinja",
        "dict.txt",
        "vocabulary",
        "mel_filters/filters.csv",
        "code/tokenization_own.py",
        "scheduler/scheduler_config.json",
    ],
)
def test_files_of_any_name_come_along(name: str, tmp_path: Path) -> None:
    out = Path(merge(linear(model(tmp_path / "m", files={name: "a b 1\n"})), tmp_path / "out"))
    assert (out / name).read_text() == "a b 1\n"
    assert verify(out) == []
    (out / name).write_text("a b 2\n")
    assert verify(out) == [f"{name} was changed"]


LEFT = {
    "adapter_model.safetensors": (save({"z": torch.ones(1)}), "other weights"),
    "onnx/model.onnx": (b"\x08\x08\x12\x07pytorch", "other weights"),
    "onnx/config.json": (b"{}", "beside other weights"),
    "odd_weights": (b"GGUF" + bytes(60), "other weights"),
    "rng_state_0.pth": (b"PK\3\4", "the state of a training"),
    "checkpoint-500/config.json": (b"{}", "the state of a training"),
    "runs/x/events.out.tfevents.1": (b"", "the state of a training"),
    "state": (b"\x80\x04}.", "a pickle, which can hold code"),
    "data.zip": (b"PK\3\4" + bytes(60), "an archive"),
    "__pycache__/x.cpython-311.pyc": (b"", "compiled code"),
    "a/.netrc": (b"", "hidden"),
    "a/id_rsa/x": (b"", "named like a key or a token"),
    "b\nc": (b"", "a name with unprintable characters"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_file_is_left_behind_for_its_reason(name: str, tmp_path: Path) -> None:
    content, reason = LEFT[name]
    files = {name: content} | ({"onnx/model.onnx": LEFT["onnx/model.onnx"][0]} if name.startswith("onnx/") else {})
    plan = plan_of(model(tmp_path / "m", files=files))
    assert (str(tmp_path / "m"), name, reason) in plan.left_behind and name not in dict(plan.files)


def test_large_files_are_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecars, "SMALL", 2_000_000)
    monkeypatch.setattr(sidecars, "LARGEST_SUM", 3_000_000)
    folder = model(tmp_path / "m", files={f"{i}.txt": bytes(1_000_000 + i) for i in range(4)} | {"x": bytes(2_000_001)})
    reasons = {name: why for _, name, why in plan_of(folder).left_behind}
    assert reasons == {"2.txt": "over 3 MB together", "3.txt": "over 3 MB together", "x": "over 2 MB"}


def test_a_link_is_judged_by_its_target(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", files={".env": "A=1", "token.txt": "t", "vocab.json": "{}"})
    for name, target in {"a.txt": ".env", "b.txt": "token.txt", "c.json": "vocab.json", "d": "gone", "e": "."}.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "f.txt")
    reasons = {name: why for _, name, why in plan_of(folder).left_behind}
    assert reasons == {
        ".env": "hidden",
        "a.txt": "hidden",
        "token.txt": "named like a key or a token",
        "b.txt": "named like a key or a token",
        "d": "a link to nothing",
        "e": "a link to a folder",
        "f.txt": "a pipe",
    }


STAND_INS: dict[str, tuple[str, bytes, str]] = {
    "a pointer": ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": ("vocab.txt", b"<!DOCTYPE html><html><body>Sign in</body></html>", "download the file again"),
    "an error of a store": ("a/tokenizer.json", b'<?xml version="1.0"?>\n<Error><Code>No</Code></Error>', "download"),
}


@pytest.mark.parametrize("case", STAND_INS)
def test_a_stand_in_for_a_file_is_refused(case: str, tmp_path: Path) -> None:
    name, content, cure = STAND_INS[case]
    with pytest.raises(FormatError, match=f"{name} is a.*, not the file; .*{cure}"):
        plan_of(model(tmp_path / "m", files={name: content}))


def test_a_vocabulary_may_begin_as_a_tag_does(tmp_path: Path) -> None:
    files = {"vocab.txt": "<unk>\n<s>\n", "chat_template.jinja": "<|im_start|>", "page.html": "<html></html>"}
    assert files.keys() <= dict(plan_of(model(tmp_path / "m", files=files)).files).keys()


# ------------------------------------------------------------------ what configs name

CODE = "from .helper import f\nclass X: pass\n"
CONFIG = {"model_type": "x", "auto_map": {"AutoConfig": "modeling_own.X", "AutoModel": "other/repo--far.Y"}}


def test_named_code_comes_from_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code that it imports, if the base lacks it; the plan and the merge say so."""
    monkeypatch.chdir(tmp_path)
    model(Path("a"), files={"config.json": CONFIG})
    model(Path("b"), 1, {"config.json": CONFIG, "modeling_own.py": CODE, "helper.py": "f = 1\n", "unused.py": ""})
    Path("r.yaml").write_text(json.dumps(linear(Path("a"), Path("b"))))
    assert "taken from b: modeling_own.py\ntaken from b: helper.py\n" in run("plan", "r.yaml").stdout
    with pytest.warns(Finding) as seen:
        out = Path(merge("r.yaml", "out"))
    assert [str(w.message).split(",")[0] for w in seen] == [
        f"{n} was taken from b" for n in ("modeling_own.py", "helper.py")
    ]
    assert (out / "modeling_own.py").read_text() == CODE and not (out / "unused.py").exists()
    assert verify(out) == []


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"config.json": CONFIG}, "config.json of .* names modeling_own.py, which is not there"),
    "imported code": ({"config.json": CONFIG, "modeling_own.py": CODE}, "modeling_own.py of .* names helper.py, which"),
    "code of a tokenizer": (
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}},
        "tokenizer_config.json of .* names own.py",
    ),
    "a pipeline": ({"config.json": {"custom_pipelines": {"x": {"impl": "pipe.P"}}}}, "config.json of .* names pipe.py"),
    "a vocabulary": (
        {"tokenizer_config.json": {"vocab_file": "spiece.model"}},
        "names spiece.model, which is not there",
    ),
    "a private file": (
        {"tokenizer_config.json": {"vocab_file": "token.txt"}, "token.txt": "a"},
        "token.txt, which was left behind: named like a key or a token",
    ),
    "a module": ({"modules.json": MODULES[:2]}, "modules.json lists 1_Pooling, which has no files"),
    "a module of another format": (
        {"modules.json": MODULES[:2], "1_Pooling/config.json": {}, "1_Pooling/weights": b"GGUF" + bytes(60)},
        "lists 1_Pooling, whose weights, 1_Pooling/weights, cannot be read",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_plan_lacks_nothing_that_a_config_names(case: str, tmp_path: Path) -> None:
    files, message = NAMED[case]
    with pytest.raises(PlanError, match=message):
        plan_of(model(tmp_path / "m", files=files))


def test_models_with_other_code_do_not_lend_it(tmp_path: Path) -> None:
    a = model(tmp_path / "a", files={"config.json": CONFIG})
    b, c = (model(tmp_path / n, 1, {"config.json": CONFIG, "modeling_own.py": f"# {n}"}) for n in "bc")
    with pytest.raises(PlanError, match=r"modeling_own\.py, which is not there; .*b and .*c have different ones"):
        plan_of(a, b, c)


def test_paths_of_another_machine_in_a_config_are_no_files(tmp_path: Path) -> None:
    config = {
        "vocab_file": "/elsewhere/spiece.model",
        "tokenizer_file": None,
        "special_tokens_map_file": "special.json",
    }
    assert "tokenizer_config.json" in dict(
        plan_of(model(tmp_path / "m", files={"tokenizer_config.json": config})).files
    )


# ------------------------------------------------------------------ modules with weights


def sentence_model(folder: Path, seed: int, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """A model as sentence-transformers saves one with a dense layer; the layer's tensors."""
    model(
        folder, seed, {"modules.json": MODULES, "1_Pooling/config.json": {}, "2_Dense/config.json": {"out_features": 3}}
    )
    draw = torch.Generator().manual_seed(seed + 10)
    dense = {"linear.weight": torch.randn(3, 4, generator=draw), "linear.bias": torch.randn(3, generator=draw)}
    if file.endswith(".bin"):
        torch.save(dense, folder / "2_Dense" / file)
    else:
        save_file(dense, folder / "2_Dense" / file)
    return dense


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("shard", [None, 16])
def test_the_weights_of_a_module_are_merged_in_its_folder(
    file: str, dtype: str | None, shard: int | None, tmp_path: Path
) -> None:
    a, b = (sentence_model(tmp_path / name, seed, file) for seed, name in enumerate("ab"))
    recipe = linear(tmp_path / "a", tmp_path / "b") | ({"dtype": dtype} if dtype else {})
    out = Path(merge(recipe, tmp_path / "out", max_shard_size=shard))
    found = {key: x for path in (out / "2_Dense").glob("*.safetensors") for key, x in load_file(path).items()}
    expected = {key: ((a[key].double() + b[key].double()) / 2).to(getattr(torch, dtype or "float32")) for key in a}
    torch.testing.assert_close(found, expected)
    names = {"2_Dense/linear.weight", "2_Dense/linear.bias", "a", "b"}
    assert open_checkpoint(out).keys() == names and verify(out) == []
    index = out / "2_Dense/model.safetensors.index.json"
    assert index.exists() == (shard is not None)
    if shard is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == a.keys() and all((out / "2_Dense" / name).exists() for name in weight_map.values())
    assert merge(recipe, tmp_path / "out", max_shard_size=shard).already_there
    largest = max((out / "2_Dense").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"\1")
    assert verify(out) == ["2_Dense/linear.weight was changed"] or verify(out) == ["2_Dense/linear.bias was changed"]


def test_all_models_need_the_weights_of_a_module(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        sentence_model(tmp_path / name, seed)
    (tmp_path / "b/2_Dense/model.safetensors").unlink()
    for pair in ((tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a")):
        with pytest.raises(PlanError, match=r"2_Dense/linear\.weight \[3, 4\] float32"):
            plan_of(*pair)


def test_a_tensor_of_a_module_keeps_its_folder_when_it_is_renamed(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        sentence_model(tmp_path / name, seed)
    recipe = linear(tmp_path / "a", tmp_path / "b")
    for entry in recipe["models"]:
        entry["rename"] = {"2_Dense/linear.": "2_Dense/dense."}
    out = Path(merge(recipe, tmp_path / "out"))
    assert load_file(out / "2_Dense/model.safetensors").keys() == {"dense.weight", "dense.bias"} and verify(out) == []
    for entry in recipe["models"]:
        entry["rename"] = {"2_Dense/": ""}
    with pytest.raises(PlanError, match=r"linear\.\w+ is a tensor of the folder 2_Dense/: begin its new name with"):
        make_plan(Recipe.parse(recipe))


def test_a_link_in_place_of_a_modules_folder_is_not_written_through(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        sentence_model(tmp_path / name, seed)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial/merge.journal").touch()
    (tmp_path / "out.partial/2_Dense").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match=r"2_Dense is a link to .*, and would be written through"):
        merge(linear(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_module_in_a_folder_elsewhere_is_not_read(tmp_path: Path) -> None:
    sentence_model(tmp_path / "a", 0)
    (tmp_path / "a/2_Dense").rename(tmp_path / "elsewhere")
    (tmp_path / "a/2_Dense").symlink_to(tmp_path / "elsewhere")
    assert open_checkpoint(tmp_path / "a").keys() == {"a", "b"}
    with pytest.raises(PlanError, match="2_Dense was left behind: a link that leads out of the folder"):
        plan_of(tmp_path / "a")


def test_the_same_rules_hold_on_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the Hub makes the same output as its folder: modules, files of any name, and what stays behind."""
    monkeypatch.chdir(tmp_path)
    more = {"a/tekken.json": "{}", "optimizer.pt": "x", ".env": "A=1", "x.gguf": "x", "notes": "text"}
    for seed, name in enumerate("ab"):
        sentence_model(Path(name), seed)
        model(Path("files") / name, files=more)
        for file in more:
            (Path(name) / file).parent.mkdir(exist_ok=True)
            (Path("files") / name / file).rename(Path(name) / file)
        hub.create(f"org/{name}", files_of(Path(name)))
    outs = list[Path]()
    for models in ("ab", ("org/a", "org/b")):
        with pytest.warns(Finding, match="were|was left behind"):
            outs.append(Path(merge(linear(*map(Path, models)), f"out{len(outs)}")))
    local, remote = map(files_of, outs)
    assert {name for name in local | remote if local.get(name) != remote.get(name)} == {
        "README.md",
        "merge.lock.json",
        "mergekit_config.yml",
    }
    assert verify(outs[1]) == [] and "2_Dense/model.safetensors" in remote and "a/tekken.json" in remote
    assert not any(name in request.path for request in hub.requests for name in (".env", "optimizer", "gguf"))


# ------------------------------------------------------------------ names of the output's files


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "weights", "model.fp16"])
@pytest.mark.parametrize("shard", [None, 8])
def test_the_output_keeps_the_stem(stem: str, shard: int | None, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / f"{stem}.safetensors")
    out = Path(merge(linear(folder), tmp_path / "out", max_shard_size=shard))
    expected = {f"{stem}.safetensors"}
    if shard is not None:
        expected = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)} | {f"{stem}.safetensors.index.json"}
    assert {name for name in files_of(out) if "safetensors" in name} == expected
    assert verify(out) == []
    again = Path(merge(linear(out), tmp_path / "again"))  # its shards, as they are
    assert {name for name in files_of(again) if "safetensors" in name} == expected


@pytest.mark.parametrize(("name", "stem"), [("pytorch_model.bin", "model"), ("net.pth.tar", "net"), ("x.ckpt", "x")])
def test_other_formats_give_the_stem(name: str, stem: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    out = Path(merge(linear(tmp_path / name), tmp_path / "out"))
    assert (out / f"{stem}.safetensors").exists() and verify(out) == []


def test_a_4_bit_model_of_mlx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("m"), files={"config.json": {"quantization": {"group_size": 64, "bits": 4}}})
    Path("r.yaml").write_text(json.dumps(linear(Path("m"))))
    assert "m is quantised" in refusal(run("plan", "r.yaml"))
    Path("r.yaml").write_text("merge_method: passthrough\nmodels: [{model: m}]\n")
    assert answer(run("plan", "r.yaml", "--json"))["tensors"] == 2


def test_a_listing_is_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("m"), files={"a/b.txt": "x", "README.md": "x", **{f"{i}.onnx": "x" for i in range(12)}})
    Path("r.yaml").write_text(json.dumps(linear(Path("m"))))
    said, data = run("plan", "r.yaml").stdout, answer(run("plan", "r.yaml", "--json"))
    assert "left behind: m: README.md: the output has its own\n" in said
    assert " and 2 more: other weights\n" in said and len(data["left_behind"]) == 13
    assert data["files"] == ["a/b.txt", "config.json"]
