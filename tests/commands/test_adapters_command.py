"""`merge` of a recipe with `job: adapters`: its plan, output and refusals; and recipes/lora_soup.yaml as it stands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_commands import ROOT, answer, refusal, run
from safetensors.torch import load_file, save_file

from mergekit_lfm import PlanError, merge, merge_adapters, merge_tensors
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.adapted import open_model

RECIPE = """
job: adapters
merge_method: ties
adapters: [{adapter: one}, {adapter: two}, {adapter: three, scale: 0.5}]
parameters: {weight: 1, density: 0.5}
rank: 2
"""


@pytest.fixture
def here(trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three adapters and a recipe of them."""
    for folder in trio:
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "soup.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_prints_the_plan(here: Path) -> None:
    result = run("merge", "soup.yaml", "--dry-run")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:4] == [
        "merge ties in the space product",
        "write an adapter at merged/soup",
        "modules 7 modules",
        "rank at most 2",
    ]
    assert "down_proj 2 16 x 24 - 4 -" in lines and "q_proj 2 16 x 16 3 2 3" in lines
    assert sorted(path.name for path in here.iterdir()) == ["one", "soup.yaml", "three", "two"]
    assert run("plan", "soup.yaml").stdout == result.stdout
    data = answer(run("merge", "soup.yaml", "--dry-run", "--json"))
    assert data["modules"][0] == {"name": "model.layers.0.self_attn.q_proj", "shape": [16, 16], "ranks": [3, 2, 3]}
    assert data["recipe"]["rank"] == 2 and data["recipe"]["adapters"][2]["scale"] == 0.5


def test_it_writes_an_adapter_and_prints_the_share_that_its_rank_keeps(here: Path) -> None:
    result = run("merge", "soup.yaml", "out")
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert "warning: one does not change 3 of 7 modules" in result.stderr
    lines = [" ".join(line.split()) for line in result.stderr.splitlines()]
    assert "module number rank kept" in lines and lines[-1].startswith("7 modules; kept ")
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "README.md",
        "adapter.lock.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = (here / "out" / "README.md").read_text()
    assert "merge_method: ties" in card and str(here) not in card
    assert "already there" in run("merge", "soup.yaml", "out").stderr
    assert "out exists; choose another output, or use --overwrite" in refusal(
        run("merge", "soup.yaml", "out", "--seed", "5")
    )
    data = json.loads(run("merge", "soup.yaml", "out", "--overwrite", "--json", "--seed", "5").stdout)
    assert {module["rank"] for module in data["modules"]} == {2} and 0 < data["kept"] < 1


def test_options_for_models_are_refused(here: Path) -> None:  # noqa: ARG001
    result = run("merge", "soup.yaml", "--memory", "1GB", "--device", "cuda")
    assert result.exit_code == 2
    assert "No stage of the recipe takes --memory, --device; leave it out." in result.stderr


def test_standard_input_is_a_recipe_as_well(here: Path) -> None:
    assert run("merge", "-", "out", standard_input=RECIPE).exit_code == 0
    assert (here / "out" / "adapter_config.json").is_file()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor of an adapter, or take it away."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(name))
    del tensors[key]
    save_file(tensors | ({} if tensor is None else {key: tensor}), path)


def test_adapters_of_other_kinds_are_refused_in_one_message(here: Path) -> None:
    """And each line says what can be done."""
    edit_config(here / "one", use_dora=True)
    tensors = load_file(here / "one" / "adapter_model.safetensors")
    norms = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(16)}
    save_file(tensors | norms, here / "one" / "adapter_model.safetensors")
    edit_config(here / "two", peft_type="IA3")
    edit_config(here / "three", r=5, lora_alpha="x")
    text = refusal(run("merge", "soup.yaml", "out"))
    assert "the adapters cannot be merged, 3 problems" in text
    assert "one: model.layers.0.self_attn.q_proj has DoRA, whose change depends on the model's weights" in text
    assert (
        "two is IA3, expected LORA, whose changes are products of matrices: apply it to its model as `model: BASE+AD"
        in text
    )
    assert "its tensors have rank 3, adapter_config.json says 5" in text and "found 'x' as its alpha" in text
    assert not (here / "out").exists() and not (here / "out.partial").exists()


def test_dora_is_known_by_its_config_alone(here: Path) -> None:
    edit_config(here / "two", use_dora=True)
    text = "two: its config has use_dora: DoRA, whose change depends on the model's weights, expected a LoRA"
    assert text in refusal(run("merge", "soup.yaml", "out"))


def test_differing_shapes_are_refused_in_one_message(here: Path) -> None:
    for layer in (0, 1):
        edit_tensors(here / "two", f"layers.{layer}.self_attn.q_proj.lora_A.weight", torch.ones(2, 12))
    text = refusal(run("merge", "soup.yaml", "out"))
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj"
        assert f"{name} has several shapes: in one [16, 16], in two [16, 12], in three [16, 16]" in text


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("0.self_attn.q_proj.lora_B.weight", None, "two: model.layers.0.self_attn.q_proj: it has no lora_B"),
        ("0.self_attn.q_proj.lora_B.weight", torch.ones(16, 3), "A [2, 16] and B [16, 3] are of other ranks"),
        ("0.self_attn.q_proj.lora_A.weight", torch.ones(0), "the training saved one part of many"),
        (
            "1.mlp.down_proj.lora_A.weight",
            torch.full((4, 24), torch.inf),
            "1.mlp.down_proj.lora_A.weight holds NaN or inf",
        ),
    ],
)
def test_damaged_adapters_are_refused(name: str, tensor: torch.Tensor | None, expected: str, here: Path) -> None:
    edit_tensors(here / "two", name, tensor)
    assert expected in refusal(run("merge", "soup.yaml", "out"))
    assert not (here / "out").exists() and not (here / "out.partial").exists()


def test_a_dtype_that_is_too_narrow_is_refused(here: Path) -> None:
    (here / "soup.yaml").write_text(RECIPE.replace("weight: 1", "lambda: 1.0e12, weight: 1") + "dtype: float16\n")
    assert "its merged values are too large for float16; choose another `dtype`" in refusal(
        run("merge", "soup.yaml", "out")
    )


def test_a_filter_that_matches_nothing_is_refused(here: Path) -> None:
    text = RECIPE.replace("density: 0.5", "density: [{filter: k_proj, value: 0.5}, {value: 1}]")
    (here / "soup.yaml").write_text(text)
    message = "parameters.density: filter 'k_proj' is part of no tensor's name, did you mean v_proj?"
    assert message in refusal(run("merge", "soup.yaml", "out"))


def test_python_takes_lists_with_a_value_for_each_adapter(here: Path) -> None:  # noqa: ARG001
    with pytest.raises(PlanError, match="density: found 2 values, expected one for each of 3 adapters"):
        merge_adapters(["one", "two", "three"], "out", method="ties", density=[0.5, 0.2])
    with pytest.raises(PlanError, match="ties has no parameter 'densty', did you mean density"):
        merge_adapters(["one", "two", "three"], "out", method="ties", densty=0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes of adapters, and the adapters that they name, hardly trained."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-W", "ignore", str(ROOT / "recipes/make/loras.py"), "adapters", "--steps", "2"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    shutil.copytree(ROOT / "recipes/quickstart", folder / "quickstart")
    for name in ("lora_soup.yaml", "lora_merge.yaml"):
        shutil.copy(ROOT / "recipes" / name, folder)
    return folder


@pytest.mark.slow  # trains adapters
def test_lora_soup_yaml_makes_an_adapter_that_a_merge_takes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    assert run("merge", "lora_soup.yaml").exit_code == 0
    out, base = trained / "merged" / "lora_soup", trained / "quickstart/base"
    assert {str(spec.dtype) for spec in open_checkpoint(out, adapter=True).values()} == {"bfloat16"}
    changed, plain = open_model(f"{base}+{out}"), open_checkpoint(base)
    moved = [name for name in plain if not torch.equal(changed.read(name), plain.read(name))]
    assert len(moved) == 21
    merge({"models": [{"model": str(base), "adapter": str(out)}], "dtype": "bfloat16"}, trained / "model")
    assert open_checkpoint(trained / "model").keys() == plain.keys()


@pytest.mark.slow  # the same
def test_lora_merge_yaml_merges_the_changes_of_two_adapters(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By TIES in memory, on the changes as numpy multiplies them out of the files."""
    monkeypatch.chdir(trained)
    assert run("merge", "lora_merge.yaml").exit_code == 0
    merged, plain = open_checkpoint("merged/lora_merge"), open_checkpoint("quickstart/base")
    files = [load_file(f"adapters/{name}/adapter_model.safetensors") for name in ("docs", "code")]
    for name, spec in plain.items():
        base, key = plain.read(name).view(spec.shape).float(), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in files[0]:
            assert torch.equal(merged.read(name), plain.read(name)), name
            continue
        pairs = [(file[f"{key}.lora_B.weight"].numpy(), file[f"{key}.lora_A.weight"].numpy()) for file in files]
        tuned = [base + share * 2 * torch.from_numpy(b @ a) for share, (b, a) in zip((1, 0.8), pairs, strict=True)]
        expected = merge_tensors("ties", tuned, base=base, weight=1.0, density=0.5).bfloat16()
        assert (merged.read(name).view(spec.shape) == expected).float().mean() > 0.995, name
