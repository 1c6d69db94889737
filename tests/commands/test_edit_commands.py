"""`mergekit-lfm edit`, `patch`, `trace` and `eval --facts`: their files, output and refusals."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import ROOT, answer, refusal, run
from helpers_text import byte_tokenizer, llama_config, save_model
from models import files_of
from safetensors.torch import load_file, save_file

from mergekit_lfm.api.changes import changes_data, rounding_warnings
from mergekit_lfm.artifacts.patch import Patch, TensorChange, open_patch
from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.show.patches import METRIC_NAMES, trace_text
from mergekit_lfm.commands.show.plots import plot_effects
from mergekit_lfm.recipe.edit import PRESETS
from mergekit_lfm.runtime import load as runtime
from mergekit_lfm.store.checkpoint import open_checkpoint

FACTS = """
facts:
  - prompt: "{} is in"
    subject: Ada
    target_new: Rome
    target_true: Oslo
    paraphrase_prompts: [We saw Ada in]
    neighborhood_prompts: [Leo is in]
    same_subject: [{prompt: Ada is a, target: cook}]
  - {prompt: "{} is in", subject: Bob, target_new: Bern}
unedited: [{prompt: Mia is in, target: Wien}]
"""
STEPS = ["--steps", "3", "--layers", "0-1"]
WEIGHTS = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
EDIT = ["edit", "m", "--facts", "facts.yaml", *STEPS, "-o", "p.st"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model m, facts, statistics g.st of m, and the patch that `edit` made from them: patch.st."""
    folder = tmp_path_factory.mktemp("edits")
    config = llama_config(max_position_embeddings=96)
    save_model(folder / "m", "LlamaForCausalLM", config, byte_tokenizer(limit=96))
    (folder / "facts.yaml").write_text(FACTS)
    (folder / "text.txt").write_text("Ada is in Oslo and Leo is a cook\n" * 4)
    stats = ["stats", "gram", str(folder / "m"), "--data", str(folder / "text.txt"), "--task", "lm", "--layers", "down"]
    assert run(*stats, "-o", str(folder / "g.st"), "-q").exit_code == 0
    edit = ["edit", str(folder / "m"), "--facts", str(folder / "facts.yaml"), "--stats", str(folder / "g.st"), *STEPS]
    assert run(*edit, "-o", str(folder / "patch.st"), "--no-verify", "-q").exit_code == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all of these files."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ edit


def test_edit_writes_a_patch_and_judges_it_as_the_files_hold_it(here: Path) -> None:
    before = files_of(here / "m")
    result = run(*EDIT, "--stats", "g.st")
    assert (result.exit_code, result.stdout) == (0, "p.st\n")
    assert files_of(here / "m") == before
    headings, first, second, counts = (line.split() for line in result.stderr.splitlines()[:4])
    assert headings == ["model", *METRIC_NAMES.values()]
    assert (first[0], second[0], counts[:3]) == ("before", "after", ["over", "2", "prompts,"])
    assert "|dW|/|W|" in result.stderr and all(weight in result.stderr for weight in WEIGHTS)
    assert run("patch", "apply", "m", "p.st", "-o", "edited", "-q").exit_code == 0
    (judged,) = answer(run("eval", "edited", "--facts", "facts.yaml", "--json"))["models"]
    assert [f"{judged[metric]:.1%}" for metric in METRIC_NAMES] == second[1:]


@pytest.mark.usefixtures("here")
def test_edit_as_json_and_the_model_that_it_saves() -> None:
    found = answer(run(*EDIT, "--stats", "g.st", "--save", "saved", "--json"))
    assert (found["out"], found["saved"]["out"], found["saved"]["undo"]) == ("p.st", "saved", "saved.undo.safetensors")
    assert [row["name"] for row in found["tensors"]] == WEIGHTS
    assert found["good"] and found["warnings"] == [] and found["facts"] == 2
    before, after, patch = load_file("m/model.safetensors"), load_file("saved/model.safetensors"), open_patch("p.st")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(WEIGHTS)
    for row in found["tensors"]:
        was, now = before[row["name"]].double(), after[row["name"]].double()
        assert (now - was - patch.change(row["name"]).double()).norm() <= 1e-6 * was.norm()
        assert row["relative"] == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-4)
        assert row["growth"] == pytest.approx(float(now.norm() / was.norm()), rel=1e-6)
        assert row["kept"] == pytest.approx(1, abs=1e-4)
    (judged,) = answer(run("eval", "saved", "--facts", "facts.yaml", "--json"))["models"]
    assert {metric: found["after"][metric] for metric in METRIC_NAMES} == {
        metric: judged[metric] for metric in METRIC_NAMES
    }


def test_facts_not_taught_well_enough_give_exit_code_1(here: Path) -> None:
    untaught = ["edit", "m", "--facts", "facts.yaml", "--identity", "--steps", "1", "--layers", "1", "-o", "p.st"]
    result = run(*untaught, "--min-efficacy", "0.9", "-q")
    assert (result.exit_code, result.stdout) == (1, "p.st\n")
    assert "the edited model says 0.0% of the facts; --min-efficacy asks for 90.0%" in result.stderr
    assert run(*untaught, "--min-efficacy", "0", "--overwrite", "-q").exit_code == 0
    result = run("patch", "apply", "m", "p.st", "-o", "edited", "--min-efficacy", "0.9", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["good"]
    assert (here / "edited" / "model.safetensors").is_file()


def test_options_of_the_line_go_before_those_of_the_file(here: Path) -> None:
    written = {"steps": 2, "clamp": 0.5, "lambda": 3.0, "context_templates": ["{}", "So. {}"], "layers": [1]}
    (here / "options.yaml").write_text(yaml.safe_dump(written))
    rest = ["--config", "options.yaml", "--clamp", "0.25", "--lambda-ratio", "2", "--no-verify", "-q"]
    assert run("edit", "m", "--facts", "facts.yaml", "--identity", "-o", "p.st", *rest).exit_code == 0
    shown = answer(run("patch", "show", "p.st", "--json"))
    options = shown["options"]
    assert (options["steps"], options["clamp"], options["lambda_ratio"]) == (2, 0.25, 2)
    assert options["context_templates"] == ["{}", "So. {}"] and options["layers"] == [1]
    assert [row["name"] for row in shown["tensors"]] == WEIGHTS[1:]


def test_options_that_do_not_go_together(here: Path) -> None:
    for options, message in [
        (["--stats", "g.st", "--identity"], "give --stats FILE"),
        ([], "give --stats FILE"),
        (["--identity", "--no-verify", "--min-efficacy", "0.5"], "leave out --no-verify"),
        (["--identity", "--layers", "a"], "expected one like 5, or 3,4,5, or 3-5"),
        (["--identity", "--layers", "3-"], "expected one like 5, or 3,4,5, or 3-5"),
        (["--identity", "--layers", "1-0"], "expected one like 5, or 3,4,5, or 3-5"),
    ]:
        result = run(*EDIT, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in " ".join(result.stderr.split())
    assert not (here / "p.st").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--facts", "no.yaml"], "no.yaml"),
        (["--facts", "odd.yaml"], "subjekt"),
        (["--config", "odd.yaml"], "odd.yaml"),
        (["--config", "list.yaml"], "expected options of `edit`"),
        (["--config", "lr.yaml"], "lr.yaml.lr"),
        (["--preset", "gpt-j-6"], "gpt-j-6b"),
        (["-o", "patch.st"], "patch.st exists and differs: options; choose another output, or use --overwrite"),
        (["-o", "m/p.st"], "lies in the input m"),
        (["-o", "facts.yaml", "--overwrite"], "lies in the input facts.yaml"),
        (["--save", "m"], "lie in one another"),
        (["--save", "m/n"], "lie in one another"),
        (["--save", "m", "--overwrite"], "lie in one another"),
        (["-o", "new", "--save", "new"], "would lie in the folder new"),
    ],
)
def test_wrong_input_is_refused_before_the_model_is_loaded(
    options: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "load_model", None)
    (here / "odd.yaml").write_text('facts: [{prompt: "{} is", subjekt: Ada, target_new: Rome}]')
    (here / "list.yaml").write_text("[1, 2]")
    (here / "lr.yaml").write_text("lr: -1")
    before = sorted(here.rglob("*"))
    assert message in refusal(run(*EDIT, "--identity", *options))
    assert sorted(here.rglob("*")) == before


@pytest.mark.usefixtures("here")
def test_statistics_of_another_kind_are_refused() -> None:
    fisher = ["stats", "fisher", "m", "--data", "text.txt", "--task", "lm", "--layers", "down", "-o", "f.st", "-q"]
    assert run(*fisher).exit_code == 0
    assert "f.st holds fisher statistics, expected second moments" in refusal(run(*EDIT, "--stats", "f.st"))
    assert "not a statistics file" in refusal(run(*EDIT, "--stats", "patch.st"))


def test_a_model_that_cannot_run_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "config.json" in refusal(run("edit", "text.txt", *EDIT[2:], "--identity"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "m" / name).unlink(missing_ok=True)
    assert "no tokenizer" in refusal(run(*EDIT, "--identity"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    for command in ([*EDIT, "--identity"], ["trace", "m", "--facts", "facts.yaml"]):
        assert 'pip install "mergekit_lfm[models]"' in refusal(run(*command))
    assert not (here / "p.st").exists()


# ------------------------------------------------------------------ patch


def test_show_describes_a_patch(here: Path) -> None:
    data = answer(run("patch", "show", "patch.st", "--json"))
    assert data["method"] == "memit" and data["base"] == open_checkpoint(here / "m").content
    assert [fact["subject"] for fact in data["facts"]] == ["Ada", "Bob"]
    patch = open_patch("patch.st")
    for row in data["tensors"]:
        assert row["norm"] == pytest.approx(float(patch.change(row["name"]).double().norm()), rel=1e-6)
        assert (row["kind"], row["rank"], row["shape"]) == ("low_rank", 2, [16, 24])
    shown = run("patch", "show", "patch.st")
    assert shown.exit_code == 0 and shown.stderr == ""
    for part in (
        "memit, 2 facts, 2 tensors",
        "Ada is in -> Rome (was Oslo)",
        "Bob is in -> Bern",
        "rank 2",
        "layers 0,1",
    ):
        assert part in shown.stdout
    assert shown.stdout in run("inspect", "patch.st").stdout
    assert answer(run("inspect", "patch.st", "--json"))["patch"] == {"path": "patch.st", **data}


@pytest.mark.usefixtures("here")
def test_show_of_many_facts_shows_ten() -> None:
    facts = [{"prompt": "{} is in", "subject": f"S{i}", "target_new": "Rome"} for i in range(13)]
    Patch.low_rank("memit", {}, facts={"facts": facts}).save("many.st")
    lines = run("patch", "show", "many.st").stdout.splitlines()
    assert sum("-> Rome" in line for line in lines) == 10 and any("and 3 more" in line for line in lines)


def test_files_that_are_not_patches_are_refused(here: Path) -> None:
    assert "not a patch file" in refusal(run("patch", "show", "g.st"))
    assert "no such patch file: no.st" in refusal(run("patch", "show", "no.st"))
    assert "not a patch file" in refusal(run("patch", "apply", "m", "g.st", "-o", "edited", "--no-verify"))
    assert not (here / "edited").exists()


@pytest.mark.parametrize("by", ["file", "moved", "base"])
def test_apply_and_undo_give_the_same_bytes_again(by: str, here: Path) -> None:
    applied = run("patch", "apply", "m", "patch.st", "-o", "edited", "--no-verify")
    assert (applied.exit_code, applied.stdout) == (0, "edited\n")
    assert "2 tensors changed" in applied.stderr and "edited.undo.safetensors undoes it" in applied.stderr
    original = (here / "m" / "model.safetensors").read_bytes()
    assert (here / "edited" / "model.safetensors").read_bytes() != original
    undo = here / "edited.undo.safetensors"
    options = {"file": [], "moved": ["--undo", "kept.st"], "base": ["--base", "m"]}[by]
    if by != "file":
        undo.rename("kept.st")
        assert "edited.undo.safetensors" in refusal(run("patch", "undo", "edited", "-o", "again"))
    undone = run("patch", "undo", "edited", "-o", "again", *options)
    assert (undone.exit_code, undone.stdout) == (0, "again\n")
    assert "2 tensors changed" in undone.stderr
    assert (here / "again" / "model.safetensors").read_bytes() == original


@pytest.mark.usefixtures("here")
def test_apply_and_undo_as_json() -> None:
    found = answer(run("patch", "apply", "m", "patch.st", "-o", "edited", "--json"))
    assert (found["out"], found["undo"], found["tensors"]) == ("edited", "edited.undo.safetensors", 2)
    assert found["after"]["counts"]["ea"] == 2 and found["good"] and not found["already_there"]
    assert found["bytes_changed"] == 2 * 16 * 24 * 4
    assert answer(run("patch", "apply", "m", "patch.st", "-o", "edited", "--json", "--no-verify"))["already_there"]
    assert answer(run("patch", "undo", "edited", "-o", "again", "--json"))["undo"] is None
    assert (
        "Give --undo FILE or --base MODEL"
        in run("patch", "undo", "edited", "-o", "x", "--undo", "a", "--base", "b").stderr
    )


def test_a_patch_of_another_model_needs_any_base(here: Path) -> None:
    tensors = load_file("m/model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, "m/model.safetensors", {"format": "pt"})
    apply = ["patch", "apply", "m", "patch.st", "-o", "edited", "--no-verify", "-q"]
    assert "has other values than those the patch was made for" in refusal(run(*apply))
    assert not (here / "edited").exists() and not (here / "edited.undo.safetensors").exists()
    assert run(*apply, "--any-base").exit_code == 0


def test_of_several_patches_the_last_word_on_a_prompt_is_verified(here: Path) -> None:
    (here / "facts.yaml").write_text('facts: [{prompt: "{} is in", subject: Ada, target_new: Wien}]')
    assert run(*EDIT, "--identity", "--no-verify", "-q").exit_code == 0
    found = answer(run("patch", "apply", "m", "patch.st", "p.st", "-o", "edited", "--any-base", "--json"))
    assert [(row["subject"], row["target_new"]) for row in found["after"]["rows"]] == [("Ada", "Wien"), ("Bob", "Bern")]


def test_patches_that_cannot_be_verified_are_refused_before_writing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("patch", "apply", "m", "patch.st", "-o", "edited", "--no-verify", "-q").exit_code == 0
    back = ["patch", "apply", "edited", "edited.undo.safetensors", "-o", "x"]
    assert "--min-efficacy needs patches made from facts; these have none" in refusal(
        run(*back, "--min-efficacy", "0.5")
    )
    (here / "m" / "config.json").rename("kept.json")
    assert "found no config.json there" in refusal(run("patch", "apply", "m", "patch.st", "-o", "x"))
    Path("kept.json").rename("m/config.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "mergekit_lfm[models]"' in refusal(run("patch", "apply", "m", "patch.st", "-o", "x"))
    assert not (here / "x").exists() and not (here / "x.undo.safetensors").exists()
    assert run("patch", "apply", "m", "patch.st", "-o", "y", "--no-verify").exit_code == 0
    result = run(*back, "-q")  # it teaches no facts, so there is nothing to verify
    assert (result.exit_code, result.stdout) == (0, "x\n")


def test_a_patch_that_changes_nothing_is_applied_but_the_answer_is_no(here: Path) -> None:
    patch = open_patch(here / "patch.st")
    Patch(patch.info, {name: torch.zeros_like(x) for name, x in patch.tensors.items()}).save(here / "zero.st")
    apply = ["patch", "apply", "m", "zero.st", "-o", "same", "--no-verify"]
    result = run(*apply, "-q")
    assert (result.exit_code, result.stdout) == (1, "same\n")
    assert result.stderr == "nothing was taught: the edited model has the very weights of MODEL\n"
    assert (here / "same/model.safetensors").read_bytes() == (here / "m/model.safetensors").read_bytes()
    found = json.loads(run(*apply, "--json").stdout)
    assert (found["changed"], found["already_there"], found["exit"]) == (False, True, 1)
    assert answer(run("patch", "apply", "m", "patch.st", "-o", "new", "--no-verify", "--json"))["changed"] is True


@pytest.mark.usefixtures("here")
def test_an_edit_that_rounding_takes_away_is_written_but_the_answer_is_no() -> None:
    result = run(*EDIT, "--identity", "--lambda", "1e30", "--no-verify", "-q")
    assert (result.exit_code, result.stdout) == (1, "p.st\n")
    assert result.stderr == "nothing was taught: the edited model has the very weights of MODEL\n"
    assert any(x.any() for x in load_file("p.st").values())


# ------------------------------------------------------------------ trace, and eval of facts


def test_trace_prints_the_effects_and_the_layers_to_edit(here: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = ["trace", "m", "--facts", "facts.yaml", "--draws", "1"]
    result = run(*trace, "-o", "t.json", "--plot", "t.png")
    assert (result.exit_code, result.stderr) == (0, "")
    found = answer(run(*trace, "--json"))
    saved = json.loads((here / "t.json").read_text())
    assert saved == {name: found[name] for name in saved}
    assert (here / "t.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["effects"]) == {"hidden", "mlp", "attention"}
    assert f"2 facts: p(target) is {found['clean']:.1%}, with noise on the subject" in result.stdout
    rows = {line.strip() for line in result.stdout.splitlines()}
    last = found["effects"]["attention"]["last token"]
    assert any(re.split("  +", row) == ["last token", *(f"{100 * x:z.1f}" for x in last)] for row in rows)
    layers = ",".join(map(str, found["layers"]))
    assert result.stdout.endswith(f"--layers {layers}\n" if layers else "no layer to suggest\n")
    told = [trace_text(found | {"layers": layers}).splitlines()[-1] for layers in ([3, 4], [])]
    assert told[0].endswith(": --layers 3,4") and told[1].endswith("no layer to suggest")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "facts.yaml", "--overwrite"], "lies in the input facts.yaml"),
        (["-o", "g.st"], "g.st exists"),
        (["--plot", "t.pdf"], "ends with .png"),
        (["--facts", "no.yaml"], "no.yaml"),
    ],
)
def test_trace_refuses_before_the_model_is_loaded(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runtime, "load_model", None)
    assert message in refusal(run("trace", "m", "--facts", "facts.yaml", *options))


@pytest.mark.usefixtures("here")
def test_eval_of_facts_is_a_row_for_each_model() -> None:
    shutil.copytree("m", "n")
    result = run("eval", "m", "n", "--facts", "facts.yaml")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["model", *METRIC_NAMES.values()] and rows[1][1:] == rows[2][1:]
    assert [rows[1][0], rows[2][0]] == ["m", "n"] and len(rows) == 4
    first, second = answer(run("eval", "m", "n", "--facts", "facts.yaml", "--json"))["models"]
    assert (first["model"], first["facts"]) == ("m", "facts.yaml")
    assert first | {"model": "n"} == second
    for options in (["--text", "text.txt"], ["--task", "lm"], ["--stride", "2"], ["--window", "8"]):
        alone = run("eval", "m", "--facts", "facts.yaml", *options)
        assert alone.exit_code == 2 and "--facts stands alone" in alone.stderr


# ------------------------------------------------------------------ measurements and plots


@pytest.mark.parametrize(("relative", "kept"), [(3e-2, 1.0), (1e-3, 0.668), (3e-4, 0.258)])
def test_rounding_leaves_a_share_of_a_small_change(relative: float, kept: float, tmp_path: Path) -> None:
    """For a change of rank one of normal weights, against independent simulations (bf16, to nearest)."""
    torch.manual_seed(0)
    weight = torch.randn(512, 256).bfloat16()
    save_file({"w": weight}, tmp_path / "model.safetensors")
    left, right = torch.randn(512, 1), torch.randn(1, 256)
    left *= relative * weight.double().norm().float() / (left @ right).norm()
    patch = Patch.low_rank("memit", {"w": (left, right, TensorChange("low_rank", (512, 256), "bfloat16", 1))})
    changes = changes_data(patch, open_checkpoint(tmp_path / "model.safetensors"))
    assert changes[0]["relative"] == pytest.approx(relative, rel=1e-3)
    assert changes[0]["kept"] == pytest.approx(kept, abs=0.06)
    warnings = rounding_warnings(changes)
    assert len(warnings) == (relative < 5e-3) and all(f"w keeps {changes[0]['kept']:.0%}" in line for line in warnings)


def test_a_heat_map_is_the_same_again_and_accepts_nan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    effects: dict[str, dict[str, list[float | None]]] = {
        kind: {"first": [0.1, -0.2, float("nan")], "last": [None] * 3} for kind in ("hidden", "mlp")
    }
    for name in "xy":
        plot_effects(effects, tmp_path / f"{name}.png", title="t")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


# ------------------------------------------------------------------ the document

DOCUMENT = ROOT / "docs" / "editing.md"


def parameters(command: list[str]) -> set[str]:
    found: Any = main
    for word in command:
        found = found.commands[word]
    return {name for parameter in found.params for name in parameter.opts}


def test_the_presets_of_the_document_are_those_that_there_are() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert set(PRESETS) == set(re.findall(r"^\| `([\w.-]+)` \| [\d-]+ \| \d+ / ", text, re.MULTILINE))


def test_the_python_example_prints_the_lines_in_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    exec(code, {})
    assert len(expected) == 2 and capsys.readouterr().out.splitlines() == expected


def test_the_commands_of_the_document_are_those_that_there_are() -> None:
    text = DOCUMENT.read_text("utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ +(?:\$ )?mergekit-lfm (.+)$", text, re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        words = line.split()
        command = words[: 1 + (words[0] in ("patch", "stats"))]
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= parameters(command), line


@pytest.mark.parametrize("verified", [True, False])
def test_the_card_of_an_edited_model_has_its_facts_and_their_cost(here: Path, verified: bool) -> None:
    options = [] if verified else ["--no-verify"]
    assert run("patch", "apply", "m", "patch.st", "-o", "edited", "-q", *options).exit_code == 0
    card = (here / "edited/README.md").read_text()
    assert "Made with mergekit_lfm" in card and "by `memit` (Meng et al. 2022" in card and "copy" not in card
    assert "https://arxiv.org/abs/2210.07229" in card
    assert "\n- Ada is in Rome (before: Oslo)\n- Bob is in Bern\n" in card
    assert ("| ES | PS | NS | EA | PA | NA | GA | QA | SA | unedited |\n" in card) == verified
    assert ("scores were not taken" in card) == (not verified)
    assert run("verify", "edited").exit_code == 0
    assert run("patch", "apply", "m", "patch.st", "-o", "edited", "-q").exit_code == 0  # there already; judged now
    assert "| unedited |" in (here / "edited/README.md").read_text() and run("verify", "edited").exit_code == 0


def test_the_card_of_a_model_that_edit_saves_has_the_scores(here: Path) -> None:
    assert run(*EDIT, "--identity", "--save", "edited", "-q").exit_code == 0
    card = (here / "edited/README.md").read_text()
    assert "\n# edited\n" in card and "\n- Ada is in Rome (before: Oslo)\n" in card and "| unedited |" in card
    assert run("verify", "edited").exit_code == 0
