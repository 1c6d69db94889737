"""Every workflow returns an outcome, warns of its findings, and says "already there" when it is repeated."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_text import byte_tokenizer, llama_config, save_model
from safetensors.torch import load_file, save_file

import mergekit_lfm as lfm
from mergekit_lfm.store.checkpoint import open_checkpoint

FACTS: dict[str, Any] = {
    "facts": [{"prompt": "{} is in", "subject": "Ada", "target_new": "Rome"}],
    "unedited": [{"prompt": "Mia is in", "target": "Wien"}],
}
MERGE = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
EDIT = ["edit", "a", "--facts", "facts.json", "--identity", "--steps", "2", "--layers", "1", "--no-verify"]
ALIGN = ["align", "b", "--to", "a", "--restarts", "1", "--sweeps", "1"]
STATS = ["stats", "gram", "a", "--data", "text.txt", "--task", "lm", "--layers", "down"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two language models, a text, facts, a recipe, and a patch of the first model."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in "ab":
        config = llama_config(max_position_embeddings=96)
        save_model(folder / name, "LlamaForCausalLM", config, byte_tokenizer(limit=96))
    random = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "b" / "model.safetensors")
    others = {name: 0.6 * torch.randn(x.shape, generator=random) if x.ndim > 1 else x for name, x in tensors.items()}
    save_file(others, folder / "b" / "model.safetensors", metadata={"format": "pt"})
    (folder / "text.txt").write_text("Ada is in Oslo and Leo is a cook\n" * 4)
    (folder / "facts.json").write_text(json.dumps(FACTS))
    (folder / "recipe.yaml").write_text(json.dumps(MERGE))
    lfm.edit_model(folder / "a", FACTS, folder / "patch.st", steps=2, layers=[1], covariance="identity", verify=False)
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with copies of the inputs."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Workflow = Callable[[], "lfm.Outcome[Any]"]
WORKFLOWS: dict[str, Workflow] = {
    "merge": lambda: lfm.merge("recipe.yaml", "new/out"),
    "apply_patches": lambda: lfm.apply_patches("a", ["patch.st"], "new/out", verify=False),
    "align_models": lambda: lfm.align_models("b", "a", "new/out.st", restarts=1, sweeps=1),
    "edit_model": lambda: lfm.edit_model(
        "a", "facts.json", "new/out.st", steps=2, layers=[1], covariance="identity", verify=False
    ),
    "collect_stats": lambda: lfm.collect_stats("gram", "a", "text.txt", "new/out.st", task="lm", layers=["down"]),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_outcome_has_path_digest_and_seconds_and_a_repeated_workflow_is_already_there(name: str) -> None:
    workflow = WORKFLOWS[name]
    first = workflow()  # makes the folder `new`
    assert isinstance(first, lfm.Outcome) and first.path is not None and first.path.exists()
    assert Path(first) == first.path and first.warnings == () and not first.already_there
    assert first.seconds > 0 and first.digest is not None and len(first.digest) == 32
    written = {path: path.stat().st_mtime_ns for path in Path("new").rglob("*")}
    again = workflow()
    assert again.already_there and again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in Path("new").rglob("*")} == written


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("command", "other"),
    [
        (["merge", "recipe.yaml", "new/out"], ["--seed", "1"]),
        (["patch", "apply", "a", "patch.st", "-o", "new/out", "--no-verify"], None),
        ([*ALIGN, "-o", "new/out"], ["--seed", "1"]),
        ([*ALIGN[:4], "--method", "ot", "-o", "new/out"], ["--cost", "cosine"]),
        ([*EDIT, "-o", "new/out"], ["--steps", "3"]),
        ([*EDIT, "-o", "new/out", "--dtype", "auto"], ["--dtype", "bfloat16"]),
        ([*EDIT[:5], "--steps", "2", "--no-verify", "-o", "new/out"], ["--layers", "1"]),
        ([*STATS, "-o", "new/out"], ["--max-examples", "1"]),
    ],
    ids=["merge", "apply", "align", "align by ot", "edit", "edit in a dtype", "edit default layers", "stats"],
)
def test_a_repeated_command_ends_with_0_and_another_is_refused(command: list[str], other: list[str] | None) -> None:
    assert run(*command).exit_code == 0
    again = run(*command)
    assert (again.exit_code, again.stdout) == (0, "new/out\n")
    assert "already there" in again.stderr
    assert answer(run(*command, "--json"))["already_there"] is True
    if other is None:
        return
    message = refusal(run(*command, *other))
    assert ("new/out exists and" in message and "--overwrite" in message) or "overwrite it" in message
    replaced = answer(run(*command, *other, "--overwrite", "--json"))
    assert replaced["already_there"] is False


def test_statistics_that_a_transform_does_not_name_are_compared_by_their_effect(here: Path) -> None:
    cross = ["stats", "cross", "a", "b", "--data", "text.txt", "--task", "lm", "-q"]
    assert run(*cross, "-o", "one.st").exit_code == 0
    (here / "text.txt").write_text("Bob went to Bern by train\n" * 4)
    assert run(*cross, "-o", "two.st").exit_code == 0
    align = ["align", "b", "--to", "a", "--method", "activation_matching", "-o", "t.st", "--stats"]
    assert run(*align, "one.st").exit_code == 0
    assert "already there" in run(*align, "one.st").stderr
    assert "t.st exists and is from other statistics" in refusal(run(*align, "two.st"))
    assert answer(run(*align, "two.st", "--overwrite", "--json"))["already_there"] is False


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["merge", "recipe.yaml", "out"], "out"),
        (["patch", "apply", "a", "patch.st", "-o", "out", "--no-verify"], "out"),
        ([*EDIT, "-o", "p.st", "--save", "out"], "out"),
        ([*ALIGN, "-o", "t.st", "--save", "out"], "out"),
    ],
    ids=["merge", "apply", "edit", "align"],
)
def test_an_existing_empty_folder_is_accepted_and_a_used_one_is_not(command: list[str], folder: str) -> None:
    Path(folder).mkdir()
    assert run(*command).exit_code == 0
    assert open_checkpoint(folder).keys() == open_checkpoint("a").keys()
    assert run(*command).exit_code == 0  # the same request again
    shutil.rmtree(folder)
    Path(folder).mkdir()
    (Path(folder) / "mine.txt").write_text("mine")
    for file in ("p.st", "t.st", "out.undo.safetensors"):
        Path(file).unlink(missing_ok=True)
    assert "out exists" in refusal(run(*command))
    assert (Path(folder) / "mine.txt").read_text() == "mine"


def test_undo_and_repair_accept_an_empty_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lfm.apply_patches("a", ["patch.st"], "edited", verify=False)
    (here / "back").mkdir()
    outcome = lfm.undo_patches("edited", "back")
    assert outcome.result.undo is None and load_file("back/model.safetensors").keys() == open_checkpoint("a").keys()
    (here / "repaired").mkdir()
    monkeypatch.setattr("mergekit_lfm.repair.folders.plan_repair", _end)
    with pytest.raises(EOFError):  # the folder was accepted, and the work begun
        lfm.repair_model("a", ("a", "b"), "text.txt", "repaired", task="lm")


def _end(*_: Any) -> None:
    raise EOFError


def test_findings_reach_the_warnings_and_the_outcome(here: Path) -> None:
    tensors = load_file(here / "b" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, here / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(lfm.Finding, match="holds NaN or infinity") as caught:
        outcome = lfm.merge("recipe.yaml", "out", nan="warn")
    assert outcome.warnings == (str(caught[0].message),) and caught[0].filename == __file__


def test_an_edit_that_rounding_eats_is_a_finding(here: Path) -> None:
    halves = {name: x.bfloat16() for name, x in load_file(here / "a" / "model.safetensors").items()}
    save_file(halves, here / "a" / "model.safetensors", metadata={"format": "pt"})
    how: dict[str, Any] = {"steps": 12, "layers": [1], "covariance": "identity", "verify": False}
    with pytest.warns(lfm.Finding, match="rounding loses part of it"):
        outcome = lfm.edit_model("a", FACTS, "p.st", **how)
    (warning,) = outcome.warnings
    command = [*EDIT, "--steps", "12", "-o", "p.st"]
    result = run(*command, "-q")
    assert (result.exit_code, result.stderr) == (0, f"warning: {warning}\n")
    shown = run(*command, "--json")
    assert (json.loads(shown.stdout)["warnings"], shown.stderr) == ([warning], f"warning: {warning}\n")


@pytest.mark.usefixtures("here")
def test_workflows_without_a_file_return_an_outcome_too() -> None:
    scores = lfm.evaluate_models(["a", "b"], text="text.txt")
    assert scores.path is None and scores.seconds > 0
    assert {model: list(files) for model, files in scores.result.items()} == {"a": ["text.txt"], "b": ["text.txt"]}
    judged = lfm.evaluate_models("a", facts="facts.json").result["a"]["facts.json"]
    line = lfm.measure_barrier("a", "b", "text.txt", points=3)
    assert len(line.result.points) == 3 and line.path is None
    traced = lfm.trace_facts("a", FACTS, "deep/trace.json", draws=1)
    assert json.loads(Path("deep/trace.json").read_text())["facts"] == len(traced.result.rows) == 1
    edited = lfm.edit_model("a", FACTS, steps=2, layers=[1], covariance="identity", min_efficacy=0)
    assert edited.path is None and edited.digest is None
    assert edited.result.before == judged and edited.result.after is not None and edited.result.good
    checked = lfm.check_table("a")
    assert checked.result.report.ok


@pytest.mark.usefixtures("here")
def test_inspect_and_verify() -> None:
    patch = lfm.inspect_file("patch.st", content=True)
    assert isinstance(patch.result.artifact, lfm.Patch) and patch.result.content == open_checkpoint("patch.st").content
    assert lfm.inspect_file("a").result.artifact is None
    out = lfm.merge("recipe.yaml", "out")
    verified = lfm.verify_output(out)
    assert (verified.path, verified.result.differences, verified.digest) == (out.path, (), out.digest)
    Path("out/config.json").write_text("{}")
    assert lfm.verify_output("out").result.differences == ("config.json was changed",)


@pytest.mark.usefixtures("here")
def test_patches_are_judged_after_applying_as_the_command_does() -> None:
    outcome = lfm.apply_patches("a", ["patch.st"], "out", min_efficacy=1)
    assert outcome.result.after is not None
    assert outcome.result.good == (outcome.result.after.ea == 1)
    with pytest.raises(lfm.PlanError, match="these have none"):
        lfm.apply_patches("out", ["out.undo.safetensors"], "again", min_efficacy=1)
    assert not Path("again").exists()


def test_the_package_shows_its_public_names() -> None:
    assert dir(lfm) == sorted(lfm.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(lfm, name) is not None for name in lfm.__all__)
