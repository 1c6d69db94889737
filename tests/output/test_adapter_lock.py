"""The lock of an adapter: what it says, what differs from it, and when an adapter is that of the same request."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from helpers_commands import run
from helpers_extract import CONFIG, draw, save_trio
from models import files_of, save_checkpoint
from safetensors.torch import load_file

from mergekit_lfm import export_patches, extract_lora, merge_adapters, verify_output
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.artifacts.patch import Patch, TensorChange
from mergekit_lfm.engine import extraction
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.kernels.low_rank import approximate

Make = Callable[[], Outcome[Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base and two fine-tunes."""
    save_trio(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extract(**options: Any) -> Outcome[Any]:
    return extract_lora("one", "base", "out", rank=3, **options)


def lock_in(out: str) -> Any:
    return json.loads(Path(out, "adapter.lock.json").read_text())


def state(out: str) -> dict[str, tuple[bytes, int]]:
    files = files_of(Path(out))
    return {name: (data, Path(out, name).stat().st_mtime_ns) for name, data in files.items()}


def test_it_has_the_digests_of_all_bytes_and_no_path_of_this_machine(here: Path) -> None:
    outcome = extract_lora(here / "one", here / "base", here / "out", rank=3)
    lock, text = lock_in("out"), Path("out", "adapter.lock.json").read_text()
    assert str(here) not in text and outcome.digest == lock["plan"]
    tensors = load_file(here / "out" / "adapter_model.safetensors")
    assert lock["tensors"].keys() == tensors.keys()
    for name, x in tensors.items():
        entry = {**lock["common"], **lock["tensors"][name]}
        assert entry["xxh3"] == [xxhash.xxh3_128_hexdigest(x.numpy().tobytes())]
        assert (entry["shape"], entry["file"]) == (list(x.shape), "adapter_model.safetensors")
    for name, digest in lock["files"].items():
        assert xxhash.xxh3_128_hexdigest(Path("out", name).read_bytes()) == digest
    assert [each["input"] for each in lock["inputs"]] == ["one", "base"]
    assert lock["recipe"]["rank"] == 3 and "torch" in lock["versions"]


def test_the_place_of_the_output_leaves_no_trace_in_its_lock_but_for_the_card(here: Path) -> None:
    extract()
    shutil.move(here / "out", here / "kept")
    extract()
    assert files_of(here / "out") == files_of(here / "kept")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda out: flip(out / "adapter_model.safetensors", -1), "norm.weight was changed"),
        (lambda out: flip(out / "adapter_model.safetensors", 30), "the header of adapter_model.safetensors was"),
        (lambda out: (out / "adapter_config.json").write_text("{}"), "adapter_config.json was changed"),
        (lambda out: (out / "README.md").unlink(), "README.md is missing"),
        (lambda out: (out / "notes.txt").touch(), "notes.txt is not in the lock"),
        (lambda out: put_into_lock(out, "plan", "0"), "adapter.lock.json was changed"),
    ],
)
@pytest.mark.usefixtures("here")
def test_verify_names_a_difference(spoil: Callable[[Path], object], expected: str) -> None:
    extract()
    assert verify_output("out").result.differences == ()
    spoil(Path("out"))
    result = run("verify", "out")
    assert result.exit_code == 1 and expected in result.stdout


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def put_into_lock(out: Path, key: str, value: object) -> None:
    lock = json.loads((out / "adapter.lock.json").read_text()) | {key: value}
    (out / "adapter.lock.json").write_text(json.dumps(lock))


@pytest.mark.usefixtures("here")
def test_verify_refuses_an_adapter_without_a_lock_and_a_recipe_for_one() -> None:
    extract()
    with pytest.raises(PlanError, match="out is an adapter, expected the output of a merge; verify it without"):
        verify_output("out", against_inputs={"models": [{"model": "base"}]})
    Path("out", "adapter.lock.json").unlink()
    with pytest.raises(FormatError, match=r"out has no merge\.lock\.json of format 3"):
        verify_output("out")


def merged(**options: Any) -> Outcome[Any]:
    for name in ("one", "two"):
        if not Path(f"{name}-lora").exists():
            extract_lora(name, "base", f"{name}-lora", rank=2)
    return merge_adapters(["one-lora", "two-lora"], "out", method="ties", density=0.5, base="base", **options)


def exported(**options: Any) -> Outcome[Any]:
    name = "model.layers.0.self_attn.q_proj.weight"
    if not Path("patch.safetensors").exists():
        was = TensorChange("low_rank", (12, 10), "float32", axis=1)
        left, right = torch.arange(12.0)[:, None], torch.ones(1, 10)
        Patch.low_rank("rome", {name: (left, right, was)}).save("patch.safetensors")
    return export_patches(["patch.safetensors"], "out", base="base", **options)


@pytest.mark.parametrize("make", [extract, merged, exported])
@pytest.mark.usefixtures("here")
def test_the_same_request_is_answered_once(make: Callable[..., Outcome[Any]]) -> None:
    first = make()
    assert not first.already_there
    before = state("out")
    again = make()
    assert again.already_there and again.result == first.result and again.digest == first.digest
    assert state("out") == before
    assert not make(overwrite=True).already_there
    assert {name: data for name, (data, _) in state("out").items()} == {n: d for n, (d, _) in before.items()}


@pytest.mark.usefixtures("here")
def test_another_request_is_refused_without_overwrite() -> None:
    extract()
    before = state("out")
    for options in ({"rank": 4}, {"rank": 3, "dtype": "bfloat16"}, {"rank": 3, "exclude": ["norm"]}):
        with pytest.raises(PlanError, match="out exists; choose another output, or use --overwrite"):
            extract_lora("one", "base", "out", **options)
    with pytest.raises(PlanError, match="out exists"):
        extract_lora("two", "base", "out", rank=3)
    assert state("out") == before


@pytest.mark.usefixtures("here")
def test_inputs_count_by_their_content() -> None:
    extract()
    shutil.copytree("one", "copy")
    shutil.rmtree("one")
    shutil.move("copy", "one")
    os.utime("one/model.safetensors", (1, 1))
    assert extract().already_there
    shutil.rmtree("one")
    save_checkpoint(Path("one"), draw(7), CONFIG)  # the same header
    with pytest.raises(PlanError, match="out exists"):
        extract()
    assert not extract(overwrite=True).already_there


@pytest.mark.usefixtures("here")
def test_the_config_of_an_input_counts() -> None:
    """It says of what class the model is, which the adapter's config depends on."""
    extract()
    Path("one/config.json").write_text(json.dumps({**CONFIG, "architectures": ["LlamaModel"]}))
    with pytest.raises(PlanError, match="out exists"):
        extract()


@pytest.mark.usefixtures("here")
def test_a_damaged_adapter_is_refused_with_its_damage() -> None:
    extract()
    path = Path("out/adapter_config.json")
    path.write_text(path.read_text() + " ")
    message = r"out is the output of this recipe, but adapter_config\.json was changed; --overwrite makes it again"
    with pytest.raises(PlanError, match=message):
        extract()
    extract(overwrite=True)
    weights = Path("out/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(PlanError, match="--overwrite makes it again"):
        extract()


@pytest.mark.usefixtures("here")
def test_an_input_that_changes_meanwhile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(*arguments: Any, **options: Any) -> Any:
        os.utime("one/model.safetensors", (2, 2))
        return approximate(*arguments, **options)

    monkeypatch.setattr(extraction, "approximate", change)
    with pytest.raises(FormatError, match="one was changed while it was read; run the same command again"):
        extract()
    assert not Path("out").exists() and not Path("out.partial").exists()


@pytest.mark.usefixtures("here")
def test_an_adapter_with_its_lock_is_replaced_and_one_with_other_files_is_not() -> None:
    extract()
    Path("out/notes.txt").touch()
    with pytest.raises(PlanError, match=r"belong to no model saved there: notes\.txt"):
        extract(overwrite=True)
