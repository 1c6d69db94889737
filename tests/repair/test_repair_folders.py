"""REPAIR of models in folders: changed and copied files, refusals, kills, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_repair import assert_repaired
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, transformers, write_lines
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
from mergekit_lfm.commands.repair import repair as command
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output import save as saving
from mergekit_lfm.repair import repair
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergekit_lfm.store.places import partial_of
from mergekit_lfm.store.tensors import write_exactly
from mergekit_lfm.views.rewritten import rewrite


def varied(folder: Path, kind: str, config: Any, tokenizer: Any = None) -> tuple[Path, Path, Path]:
    """Two models that differ in all their tensors, and their mean."""
    found: list[dict[str, Tensor]] = []
    for i, name in enumerate("ab"):
        path = save_model(folder / name, kind, config, tokenizer)
        draw = torch.Generator().manual_seed(i)
        old = load_file(path / "model.safetensors")
        new = {
            n: x + 0.2 * torch.randn(x.shape, generator=draw) for n, x in sorted(old.items()) if x.is_floating_point()
        }
        new = {n: x.abs() if n.endswith("running_var") else x for n, x in new.items()}
        found.append({n: new.get(n, x).to(x.dtype) for n, x in old.items()})
        save_file(found[-1], path / "model.safetensors", {"format": "pt"})
    (folder / "m").mkdir()
    for file in (folder / "a").iterdir():
        if file.suffix != ".safetensors":
            (folder / "m" / file.name).write_bytes(file.read_bytes())
    mean = {n: ((x + found[1][n]) / 2).to(x.dtype) if x.is_floating_point() else x for n, x in found[0].items()}
    save_file(mean, folder / "m" / "model.safetensors", {"format": "pt"})
    (folder / "m" / "README.md").write_text("# A mean\n")
    (folder / "m" / "merge.lock.json").write_text("{}")
    return folder / "a", folder / "b", folder / "m"


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    config = bert_config(num_hidden_layers=2, num_labels=3)
    return varied(
        tmp_path_factory.mktemp("berts"), "BertForSequenceClassification", config, byte_tokenizer(special=True)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = ({"text": f"a text {'of some length '[: i % 7]}{i * i}"} for i in range(40))
    return write_lines(tmp_path_factory.mktemp("texts") / "x.jsonl", *lines)


def inputs_of(folder: Path, data: Path, task: str) -> list[dict[str, Tensor]]:
    return [batch.kwargs for batch in read_data(data, task, load_model(folder, task).tokenizer)]


DENSE = [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)] + ["bert.pooler.dense"]


def test_a_folder_is_repaired_under_the_names_on_the_disk(
    berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path
) -> None:
    a, b, merged = berts
    done = repair(merged, (a, b), texts, tmp_path / "out", task="classification")
    assert [layer.name for layer in done.layers] == DENSE
    one, two, fixed = (load_model(path, "classification").model for path in (a, b, tmp_path / "out"))
    assert_repaired(fixed, [one, two], inputs_of(a, texts, "classification"), DENSE)
    before, after = (load_file(folder / "model.safetensors") for folder in (merged, tmp_path / "out"))
    assert list(before) == list(after)
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {f"{name}.{part}" for name in DENSE for part in ("weight", "bias")}
    files = {path.name for path in merged.iterdir()} - {"merge.lock.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"repair.json"}
    assert (tmp_path / "out" / "README.md").read_text() == "# A mean\n"
    facts = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert [layer["name"] for layer in facts["layers"]] == DENSE
    assert [end["model"] for end in facts["ends"]] == ["a", "b"]
    assert str(tmp_path) not in json.dumps(facts)


def test_an_end_may_have_an_adapter(berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path) -> None:
    """It gives what the model does with the adapter merged in: here a bias in place of the model's."""
    a, b, merged = berts
    name, lora = f"{DENSE[0]}.bias", tmp_path / "lora"
    lora.mkdir()
    save_file({f"base_model.model.{name}": torch.ones(open_checkpoint(b)[name].shape)}, lora / ADAPTER_WEIGHTS[0])
    (lora / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    shutil.copytree(b, tmp_path / "whole")
    tensors = load_file(b / "model.safetensors")
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    for end, out in ((Path(f"{b}+{lora}"), "one"), (tmp_path / "whole", "two")):
        repair(merged, (a, end), texts, tmp_path / out, task="classification")
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    facts = json.loads((tmp_path / "one" / "repair.json").read_text())
    assert str(tmp_path) not in json.dumps(facts)
    with pytest.raises(PlanError, match="input"):
        repair(merged, (a, Path(f"{b}+{lora}")), texts, lora, task="classification", overwrite=True)
    assert sorted(path.name for path in lora.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS[0]]


def test_dtypes_are_kept_and_layers_measured_as_they_are_stored(
    berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path
) -> None:
    a, b, merged = berts
    half = tmp_path / "half"
    half.mkdir()
    for file in merged.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    tensors = load_file(merged / "model.safetensors")
    save_file({n: x.bfloat16() for n, x in tensors.items()}, half / "model.safetensors", {"format": "pt"})
    repair(half, (a, b), texts, tmp_path / "out", task="classification")
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    one, two, fixed = (load_model(path, "classification").model for path in (a, b, tmp_path / "out"))
    assert_repaired(fixed, [one, two], inputs_of(a, texts, "classification"), DENSE, tolerance=0.03)


def test_shards_stay_shards(berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path) -> None:
    a, b, merged = berts
    repair(merged, (a, b), texts, tmp_path / "whole", task="classification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for file in merged.glob("token*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    repair(tmp_path / "shards", (a, b), texts, tmp_path / "out", task="classification")
    names = {path.name for path in (tmp_path / "shards").glob("model*")}
    assert {path.name for path in (tmp_path / "out").glob("model*")} == names and len(names) > 3
    one, two = (open_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert one.content == two.content
    load_model(tmp_path / "out", "classification")


def test_the_second_end_is_rewritten_first(berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path) -> None:
    """With its hidden units in another order, a has the same function: the mean of a and a is a again."""
    a, _, _ = berts
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    symmetries = find_symmetries(open_checkpoint(a))
    shuffle = Transform(symmetries, {"ffn.1": UnitsElement(order=order)}, TransformInfo("shuffle"))
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for file in a.iterdir():
        (shuffled / file.name).write_bytes(file.read_bytes())
    save_file(rewrite(load_file(a / "model.safetensors"), shuffle), shuffled / "model.safetensors", {"format": "pt"})
    back = Transform(symmetries, {"ffn.1": UnitsElement(order=order.argsort())}, TransformInfo("back"))
    back.save(tmp_path / "back.safetensors")
    repair(a, (a, shuffled), texts, tmp_path / "x", task="classification", transform=tmp_path / "back.safetensors")
    repair(a, (a, shuffled), texts, tmp_path / "y", task="classification")
    kept, right, wrong = (load_file(path / "model.safetensors") for path in (a, tmp_path / "x", tmp_path / "y"))
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(right[name], kept[name])
    assert not torch.allclose(wrong[name], kept[name], rtol=0.05)


def test_batchnorm_of_images_and_gpt2s_transposed_layers(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    a, b, merged = varied(tmp_path / "r", "ResNetForImageClassification", config)
    torch.manual_seed(0)
    pixels = [{"pixel_values": torch.randn(n, 3, 32, 32)} for n in (6, 5)]
    done = repair(merged, (a, b), pixels, tmp_path / "out", task="classification")
    assert done.layers == () and len(done.batchnorms) == sum(n.endswith("running_var") for n in open_checkpoint(merged))
    expected = load_model(merged, "classification").model
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for batch in pixels:
            expected(**batch)
    found = load_model(tmp_path / "out", "classification").model.state_dict()
    torch.testing.assert_close(found, dict(expected.state_dict()))
    config = transformers.GPT2Config(
        vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    a, b, merged = varied(tmp_path / "g", "GPT2LMHeadModel", config)
    ids = [{"input_ids": torch.randint(258, (8, 20))} for _ in range(3)]
    done = repair(merged, (a, b), ids, tmp_path / "gpt2", task="lm")
    names = [f"transformer.h.{i}.mlp.c_fc" for i in range(2)]
    assert [layer.name for layer in done.layers] == names
    one, two, fixed = (load_model(path, "lm").model for path in (a, b, tmp_path / "gpt2"))
    assert_repaired(fixed, [one, two], ids, names)


def test_a_llama_has_nothing_to_repair(tmp_path: Path) -> None:
    a, b, merged = varied(tmp_path, "LlamaForCausalLM", llama_config(), byte_tokenizer())
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(PlanError, match="nothing to repair") as refused:
        repair(merged, (a, b), tmp_path / "x.txt", tmp_path / "out", task="lm")
    assert "model.layers.0.mlp.up_proj: it has no bias" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_or_in_the_way(berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path) -> None:
    a, b, merged = berts
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PlanError, match="exists; choose another output"):
        repair(merged, (a, b), texts, out, task="classification")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(PlanError, match=r"would be deleted, with files in it .*: mine.txt; move"):
        repair(merged, (a, b), texts, out, task="classification", overwrite=True)
    (out / "mine.txt").unlink()
    for _ in range(2):
        repair(merged, (a, b), texts, out, task="classification", overwrite=True)
    assert (out / "repair.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(PlanError, match="lie in one another"):
        repair(merged, (a, b), texts, merged, task="classification", overwrite=True)
    foreign = partial_of(tmp_path / "new")
    foreign.mkdir()
    (foreign / "merge.journal").write_text("another run's")
    with pytest.raises(PlanError, match="not the unfinished output of an earlier run"):
        repair(merged, (a, b), texts, tmp_path / "new", task="classification")
    assert (foreign / "merge.journal").exists() and not (tmp_path / "new").exists()


def test_a_failure_or_a_kill_leaves_no_output(
    berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, merged = berts
    out, write = tmp_path / "out", write_exactly

    def failing(fd: int, offset: int, data: memoryview) -> None:
        if offset > 20_000:
            raise OSError(28, "No space left on device")
        write(fd, offset, data)

    def killing(fd: int, offset: int, data: memoryview) -> None:
        write(fd, offset, data)
        if offset > 20_000:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(saving, "write_exactly", failing)
    with pytest.raises(OSError, match="No space left"):
        repair(merged, (a, b), texts, out, task="classification")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(saving, "write_exactly", killing)
    pid = os.fork()
    if not pid:
        repair(merged, (a, b), texts, out, task="classification")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.setattr(saving, "write_exactly", write)
    repair(merged, (a, b), texts, out, task="classification")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_model(out, "classification")


def test_the_command(berts: tuple[Path, Path, Path], texts: Path, tmp_path: Path) -> None:
    a, b, merged = berts
    options = [str(merged), "--ends", str(a), str(b), "--data", str(texts), "--task", "classification", "-o"]
    result = CliRunner(catch_exceptions=False).invoke(command, [*options, str(tmp_path / "x"), "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert [layer["name"] for layer in json.loads(result.stdout)["layers"]] == DENSE
    shown = CliRunner(catch_exceptions=False).invoke(command, [*options, str(tmp_path / "y")])
    assert (shown.exit_code, shown.stdout) == (0, f"{tmp_path / 'y'}\n")
    assert [line.split()[0] for line in shown.stderr.splitlines()[:2]] == ["layer", DENSE[0]]
    again = CliRunner().invoke(command, [*options, str(tmp_path / "y")])
    assert again.exit_code == 2 and "exists; choose another output" in again.stderr
    one, two = (open_checkpoint(tmp_path / name).content for name in "xy")
    assert one == two
    unequal = CliRunner().invoke(command, [*options, str(tmp_path / "z"), "--weights", "0.5", "0.6"])
    assert unequal.exit_code == 2 and "expected 2 numbers of at least 0 with sum 1" in unequal.stderr
