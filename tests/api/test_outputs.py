"""Other libraries read the output: safetensors, transformers, an index; the way of running changes no byte."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_faults import Forks, llama_tensors, near, output_snapshot, save_model, write_tensors
from helpers_merges import LINEAR, TIES, Tensors, average, load_all, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge, merge_tensors
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.names import public_names
from mergekit_lfm.store.tensors import read_header

# ------------------------------------------------------------------ the official library, shards, modes


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Tensors]:
    """`base`, `a` and `b` in the folder, bfloat16, in three shards, with an integer buffer and a scalar."""
    base = {name: tensor.bfloat16() for name, tensor in llama_tensors(0).items()}
    base |= {"model.position_ids": torch.arange(64)[None], "model.scale": torch.tensor(0.5, dtype=torch.bfloat16)}
    made = {"base": base, "a": near(base, 1), "b": near(base, 2)}
    for name, tensors in made.items():
        save_model(tmp_path / name, tensors, shards=3)
    return made


def test_the_safetensors_library_opens_every_shard(tmp_path: Path, models: dict[str, Tensors]) -> None:
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out"))
    expected = average(models["a"], models["b"], torch.bfloat16)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in models["a"].values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata()["format"] == "pt"
            tensor = shard.get_tensor(name)
        assert tensor.dtype == models["a"][name].dtype
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=1e-30)
        else:
            assert torch.equal(tensor, models["a"][name])
    assert load_all(out).keys() == expected.keys()


def test_the_layout_of_the_template_is_kept(tmp_path: Path, models: dict[str, Tensors]) -> None:
    out = Path(merge(write_recipe(tmp_path, TIES), tmp_path / "out"))
    for path in (tmp_path / "base").glob("*.safetensors"):
        ours, theirs = read_header(out / path.name), read_header(path)
        assert list(ours.tensors.values()) == [
            (spec, offset - theirs.data_start + ours.data_start) for spec, offset in theirs.tensors.values()
        ]
    assert len(list(out.glob("*.safetensors"))) == 3
    assert set(models["base"]) == set(load_all(out))


@pytest.mark.parametrize("pad", [0, 1, 8, 1000, 3504, 4088, 5003])
def test_data_starts_where_the_template_has_it(tmp_path: Path, pad: int) -> None:
    """Modulo 4096, so that a file system with reflinks can share blocks."""
    tensors = llama_tensors(0)
    save_model(tmp_path / "a", tensors, pad=pad)
    save_model(tmp_path / "b", tensors)
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out"))
    theirs = read_header(tmp_path / "a" / "model.safetensors").data_start
    assert read_header(out / "model.safetensors").data_start % 4096 == theirs % 4096


@pytest.mark.parametrize("pad", range(1, 8))
def test_odd_data_start_in_an_input(tmp_path: Path, pad: int) -> None:
    """The format allows data at any byte; values do not depend on it."""
    a, b = llama_tensors(0), llama_tensors(1)
    save_model(tmp_path / "a", a, pad=pad)
    save_model(tmp_path / "b", b, pad=7 - pad)
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out"))
    expected = average(a, b, torch.float32)
    for name, tensor in load_all(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027, 0o002])
def test_file_modes_follow_the_umask(cli: Forks, tmp_path: Path, models: dict[str, Tensors], umask: int) -> None:
    (tmp_path / "a" / "tokenizer.json").chmod(0o600)
    write_recipe(tmp_path, LINEAR)
    assert cli.run("recipe.yaml", "out", cwd=tmp_path, umask=umask).code == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > len(models)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("limit", [10_000, 20_000, 1_000_000])
def test_max_shard_size(tmp_path: Path, limit: int) -> None:
    """No shard exceeds the limit, except a tensor larger than it, which is alone; the tensors are the same."""
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out", max_shard_size=limit))
    whole = load_all(Path(merge(tmp_path / "recipe.yaml", tmp_path / "whole")))
    cut = load_all(out)
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    shards = sorted(out.glob("*.safetensors"))
    for path in shards:
        tensors = read_header(path).tensors
        assert sum(spec.nbytes for spec, _ in tensors.values()) <= limit or len(tensors) == 1
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert not (out / "model.safetensors.index.json").exists()
    else:
        assert [p.name for p in shards] == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == {name: path.name for path in shards for name in read_header(path).tensors}
    assert (len(shards) == 1) == (limit == 1_000_000)


def test_tensor_larger_than_the_limit(tmp_path: Path, models: dict[str, Tensors]) -> None:
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out", max_shard_size=10))
    assert len(list(out.glob("*.safetensors"))) == len(models["a"])
    assert load_all(out).keys() == models["a"].keys()


def test_the_output_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "a", llama_tensors(0))
    recipe = write_recipe(tmp_path, "merge_method: passthrough\nmodels: [{model: a}]\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert merge(recipe, "~/given").path == tmp_path / "home" / "given"
    assert not (tmp_path / "~").exists()


# ------------------------------------------------------------------ the same bytes however it runs


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with one tensor that does not fit a small budget, among small ones."""
    folder = tmp_path_factory.mktemp("large")
    base = {name: tensor.bfloat16() for name, tensor in llama_tensors(0).items()}
    base["lm_head.weight"] = torch.randn(6000, 1024, generator=torch.Generator().manual_seed(3)).bfloat16()
    base["model.position_ids"] = torch.arange(64)[None]
    for name, tensors in {"base": base, "a": near(base, 1), "b": near(base, 2)}.items():
        save_model(folder / name, tensors, shards=2)
    return folder


MANY = {
    "ties": TIES,
    "dare_ties": TIES.replace("ties", "dare_ties") + "seed: 3\n",
    "breadcrumbs": TIES.replace("ties", "breadcrumbs"),
    "linear": LINEAR,
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}\n",
    "karcher": "merge_method: karcher\nmodels: [{model: base}, {model: a}, {model: b}]\n",
    "passthrough": "merge_method: passthrough\nmodels: [{model: a}]\n",
}


@pytest.mark.parametrize("recipe", MANY.values(), ids=MANY)
def test_threads_and_memory_change_no_byte(cli: Forks, large: Path, tmp_path: Path, recipe: str) -> None:
    """Nor of the lock and the model card; the budget of 100 MB is less than the large tensor's task takes at once."""
    write_recipe(large, recipe)
    seen = {}
    for options in ((1, "4GB"), (2, "4GB"), (3, "100MB"), (1, "100MB")):
        out = tmp_path / f"{options[0]}-{options[1]}"
        ran = cli.run("recipe.yaml", out, "--threads", options[0], "--memory", options[1], cwd=large)
        assert ran.code == 0, ran.err
        seen[options] = output_snapshot(out)
    first = seen.pop((1, "4GB"))
    for options, found in seen.items():
        assert found.keys() == first.keys()
        assert [name for name in found if found[name] != first[name]] == [], options


def test_torchs_threads_change_no_merge_in_memory() -> None:
    """Sums of float64 over many elements depend on how many threads add them."""
    random = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(700_000, dtype=torch.float64, generator=random) for _ in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(merge_tensors("model_stock", [a, b], base=base))
            with pytest.raises(PlanError, match="cannot be normalised"):
                merge_tensors("linear", [a, b], weight=[1, -1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, found[0]) for tensor in found)


# ------------------------------------------------------------------ transformers loads it


def perturbed(state: Tensors, seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=random) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def tiny(kind: str) -> Any:
    """A small random model of transformers."""
    import transformers as tf

    sizes: dict[str, Any]
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = tf.LlamaConfig(vocab_size=64, num_hidden_layers=2, attention_bias=True, **sizes, **ids)
        return tf.LlamaForCausalLM(config)
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, **ids))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 32}
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes))


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_transformers_loads_the_merge(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """No key missing or unexpected, biases and tied weights kept, and the outputs of the float64 formula."""
    model = tiny(kind).to(dtype)
    states = []
    for seed, name in enumerate("ab", 1):
        variant = type(model)(model.config).to(dtype)
        variant.load_state_dict(perturbed(model.state_dict(), seed))
        variant.tie_weights()
        variant.save_pretrained(tmp_path / name)
        states.append(load_file(tmp_path / name / "model.safetensors"))
        if kind == "bert":  # as older releases saved it
            buffer = {"bert.embeddings.position_ids": torch.arange(32)[None]}
            save_file(states[-1] | buffer, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    loaded, info = type(model).from_pretrained(out, output_loading_info=True, local_files_only=True)
    assert loaded.dtype == dtype
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {"bert.embeddings.position_ids"}
    if kind == "bert":
        assert torch.equal(load_all(out)["bert.embeddings.position_ids"], torch.arange(32)[None])
    reference = type(model)(model.config).to(dtype)
    missing = reference.load_state_dict(average(states[0], states[1], dtype), strict=False)
    assert not missing.unexpected_keys
    reference.tie_weights()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=tolerance, atol=tolerance)


def test_biases_are_kept(tmp_path: Path) -> None:
    """A Llama with attention biases has 29 tensors, all of them merged."""
    tensors = [tiny("llama").state_dict(), perturbed(tiny("llama").state_dict(), 1)]
    for name, state in zip("ab", tensors, strict=True):
        save_model(tmp_path / name, state)
    found = load_all(Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out")))
    assert len(found) == 29
    for name, expected in average(tensors[0], tensors[1], torch.float32).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


DTYPE_CASES = [
    ("", "bfloat16", "bfloat16"),
    ("dtype: float16\n", "float16", "float16"),
    ("dtype: float32\n", "float32", "float32"),
    ("dtype: float32\nout_dtype: bfloat16\n", "bfloat16", "bfloat16"),
    ("out_dtype: float64\n", "float64", "float64"),
]


@pytest.mark.parametrize(("line", "tensors", "config"), DTYPE_CASES)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_in_the_config_agrees(tmp_path: Path, line: str, tensors: str, config: str, key: str) -> None:
    """Under the key that the template's config has, and in no other."""
    base = {name: tensor.bfloat16() for name, tensor in llama_tensors(0).items()}
    for name in "ab":
        save_model(tmp_path / name, near(base, ord(name)))
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", key: "bfloat16"}))
    out = Path(merge(write_recipe(tmp_path, line + LINEAR), tmp_path / "out"))
    assert {str(t.dtype) for t in load_all(out).values()} == {f"torch.{tensors}"}
    written = json.loads((out / "config.json").read_text())
    assert {written[name] for name in ("dtype", "torch_dtype") if name in written} == {config}


def test_dtypes_are_promoted_by_tensor(tmp_path: Path) -> None:
    """bfloat16 with float16 makes float32; the config names the most frequent dtype."""
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16)):
        tensors = {key: tensor.bfloat16() for key, tensor in llama_tensors(ord(name)).items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        save_model(tmp_path / name, tensors)
    out = Path(merge(write_recipe(tmp_path, LINEAR), tmp_path / "out"))
    found = load_all(out)
    assert found.pop("model.norm.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


MIXED = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"dtype": "float32"}}
QUANTISED = {"quantization_config": {"torch_dtype": "float16"}}


@pytest.mark.parametrize(
    ("lines", "config", "expected"),
    [
        ("", MIXED, MIXED),
        ("", MIXED | {"torch_dtype": "float16"}, MIXED),
        ("", {"vision_config": {"dtype": None}}, {"dtype": "bfloat16", "vision_config": {"dtype": None}}),
        (
            "",
            {"dtype": "float16", "a": {"b": {"torch_dtype": "float16", "c": {"torch_dtype": "float32"}}}},
            {"dtype": "bfloat16", "a": {"b": {"torch_dtype": "bfloat16", "c": {"torch_dtype": "float32"}}}},
        ),
        (
            "dtype: float16\n",
            MIXED | QUANTISED,
            {"torch_dtype": "float16", **{part: {"dtype": "float16"} for part in ("text_config", "vision_config")}}
            | QUANTISED,
        ),
    ],
    ids=["as it was", "the whole only", "unnamed", "nested", "one dtype for all"],
)
def test_dtypes_of_parts_of_the_model(tmp_path: Path, lines: str, config: Tensors, expected: Tensors) -> None:
    """A part keeps a dtype that differs from the whole's, unless all tensors have one. Quantisation stays."""
    tensors = {name: tensor.bfloat16() for name, tensor in llama_tensors(0).items()}
    tensors["vision.weight"] = torch.ones(3)
    for name in "ab":
        save_model(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    recipe = "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: 2}\n"
    out = Path(merge(write_recipe(tmp_path, lines + recipe), tmp_path / "out"))
    assert json.loads((out / "config.json").read_text()) == expected


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_is_not_a_json_object(tmp_path: Path, content: str) -> None:
    save_model(tmp_path / "a", llama_tensors(0))
    (tmp_path / "a" / "config.json").write_text(content)
    with pytest.raises(FormatError, match=r"a/config\.json"):
        merge(write_recipe(tmp_path, "merge_method: passthrough\nmodels: [{model: a}]\n"), tmp_path / "out")


# ------------------------------------------------------------------ model names in the output


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("/~a-2", min_size=1, max_size=6), unique=True))
def test_public_names_are_different_and_have_no_folders_of_the_machine(labels: list[str]) -> None:
    names = public_names(labels)
    assert list(names) == labels
    assert len(set(names.values())) == len(labels)
    for label, name in names.items():
        if label.startswith(("/", "~")):
            assert name.count("/") <= 1 and not name.startswith(("/", "~/"))
        else:
            assert name == label


def test_public_names_are_numbered_where_they_are_equal() -> None:
    labels = ["/x/final", "/y/final/", "/z/final-2", "final", "../final", "/y/final (2)", "/final", "/w/x/final"]
    expected = ["x/final", "y/final", "final-2", "final", "final-3", "final (2)", "final-4", "x/final-2"]
    assert list(public_names(labels).values()) == expected


def test_the_folder_of_a_user_is_no_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    labels = ["/home/ada/a.safetensors", "~/a.safetensors", "/home/ada/old/a.safetensors"]
    assert [*public_names(labels).values()] == ["a.safetensors", "a.safetensors-2", "old/a.safetensors"]


def test_models_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    """In the lock (inputs, recipe, dropped tensors) and in the card, and without the folders."""
    for seed, run in enumerate(("base", "one", "two")):
        tensors = llama_tensors(seed)
        if run == "two":
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_model(tmp_path / run / "final", tensors)
    base, one, two = (f"{tmp_path}/{run}/final" for run in ("base", "one", "two"))
    recipe = f"merge_method: ties\nbase_model: {base}\nmodels: [{{model: {two}}}, {{model: {one}}}, {{model: {two}}}]\n"
    out = Path(merge(write_recipe(tmp_path, recipe + "parameters: {weight: 1}\n"), tmp_path / "out"))
    lock = json.loads((out / "merge.lock.json").read_text())
    assert [entry["model"] for entry in lock["inputs"]] == ["base/final", "two/final", "one/final", "final (2)"]
    assert lock["recipe"]["base_model"] == "base/final"
    assert [entry["model"] for entry in lock["recipe"]["models"]] == ["two/final", "one/final", "two/final"]
    assert [entry["model"] for entry in lock["dropped"]] == ["two/final", "final (2)"]
    card = (out / "README.md").read_text()
    assert "- base/final (base)\n- two/final\n- one/final\n- final (2)\n" in card
    assert "base_model: base/final\nmodels:\n- model: two/final\n- model: one/final\n- model: two/final\n" in card
    assert [path.name for path in out.iterdir() if str(tmp_path).encode() in path.read_bytes()] == []


def test_the_card_of_a_merge_of_the_base_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "a", llama_tensors(0))
    text = "merge_method: linear\nbase_model: a\nmodels: []\nparameters: {weight: 1}\n"
    out = Path(merge(write_recipe(tmp_path, text), tmp_path / "out"))
    card = (out / "README.md").read_text()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == {**yaml.safe_load(text), "parameters": {"weight": 1.0}, "seed": 0}


# ------------------------------------------------------------------ many small tensors


def write_tiny(folder: Path, count: int) -> Path:
    """Two models of so many tensors, one of ones, one of fives, and the recipe that averages them to fours."""
    for name, value in (("a", 1.0), ("b", 5.0)):
        (folder / name).mkdir()
        tensors = {f"model.layers.{i // 100}.part.{i % 100}.weight": torch.full((4,), value) for i in range(count)}
        write_tensors(folder / name / "model.safetensors", tensors)
    return write_recipe(folder, LINEAR)


def test_a_thousand_tiny_tensors(tmp_path: Path) -> None:
    found = load_all(Path(merge(write_tiny(tmp_path, 1000), tmp_path / "out")))
    assert len(found) == 1000
    assert all(torch.equal(tensor, torch.full((4,), 4.0)) for tensor in found.values())


@pytest.mark.slow
def test_ten_thousand_tiny_tensors(tmp_path: Path) -> None:
    """Under 15 s in all, start-up included, or on a slow machine 8 times the start-up; in processor time."""
    write_tiny(tmp_path, 10_000)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}

    def processor_seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds = processor_seconds("-m", "mergekit_lfm", "merge", "recipe.yaml", "out")
    assert seconds < max(15, 8 * processor_seconds("-c", "import mergekit_lfm.engine.execute"))
    found = load_all(tmp_path / "out")
    assert len(found) == 10_000
    assert all(torch.equal(tensor, torch.full((4,), 4.0)) for tensor in found.values())
