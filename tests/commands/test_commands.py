"""The command line as a shell and a script see it: streams, exit codes, JSON, resuming, the progress bar."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from helpers_commands import ROOT, answer, on_a_terminal, refusal, run, start, wait_for
from models import output_of, save_checkpoint
from safetensors.torch import load_file, save_file

import mergekit_lfm
from mergekit_lfm import open_checkpoint
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.sizes import format_size, parse_size
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.shards import ShardFiles
from mergekit_lfm.recipe.registry import all_methods
from mergekit_lfm.version import __version__

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_checkpoint(folder, tensors, {"model_type": "llama", "dtype": "float32"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: models a and b of two tensors, and recipe.yaml, their average."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        save(tmp_path / name, {"w": torch.full((3, 4), value), "layers.0.v": torch.full((5,), -value)})
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ merge


def test_merge_prints_where_the_result_is(folder: Path) -> None:
    result = run("merge", "recipe.yaml", "out/model")
    assert (result.exit_code, result.stdout) == (0, "out/model\n")
    assert result.stderr.startswith("wrote 2 tensors, 68 B, in ")
    assert result.stderr.count("\n") == 1
    merged = load_file(folder / "out/model/model.safetensors")
    assert {name: set(t.flatten().tolist()) for name, t in merged.items()} == {"w": {2.0}, "layers.0.v": {-2.0}}


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_system_that_starts_no_threads_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    really_start, left = threading.Thread.start, [*range(allowed)]

    def start_some(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        really_start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_some)
        assert "use fewer --threads" in refusal(run("merge", "recipe.yaml", "out", "--threads", "2"))
        with pytest.raises(PlanError, match="use fewer --threads"):
            mergekit_lfm.merge("recipe.yaml", "out", threads=2)
    assert not (folder / "out").exists()
    assert run("merge", "recipe.yaml", "out", "--threads", "2").exit_code == 0


@pytest.mark.parametrize(
    ("error", "advice"),
    [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "--max-shard-size"), (errno.EROFS, "another place")],
)
def test_errors_of_the_system_name_their_cure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int, advice: str
) -> None:
    def refuse(files: ShardFiles, shard: int) -> None:
        raise OSError(error, os.strerror(error), files.path(shard))

    monkeypatch.setattr(ShardFiles, "fileno", refuse)
    message = refusal(run("merge", "recipe.yaml", "out"))
    assert os.strerror(error) in message and str(folder / "out.partial") in message and advice in message


def test_a_recipe_on_standard_input_is_that_of_a_file_here(folder: Path) -> None:
    run("merge", "recipe.yaml", "file")
    assert run("merge", "-", "piped", standard_input=LINEAR).stdout == "piped\n"
    assert output_of(folder / "piped") == output_of(folder / "file")
    digest = answer(run("plan", "recipe.yaml", "x", "--json"))["digest"]
    assert answer(run("plan", "-", "x", "--json", standard_input=LINEAR))["digest"] == digest
    assert "no output: give OUT" in refusal(run("merge", "-", standard_input=LINEAR))
    assert "standard input is not UTF-8 text" in refusal(run("merge", "-", "x", standard_input=b"\xff"))
    assert "standard input: it is empty" in refusal(run("merge", "-", "x", standard_input=""))


def test_quiet_leaves_the_result_alone(folder: Path) -> None:
    result = run("merge", "recipe.yaml", "-q")
    assert (result.stdout, result.stderr) == ("merged/recipe\n", "")
    assert (folder / "merged/recipe/model.safetensors").exists()


def test_the_default_output_is_the_recipes_else_merged(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(LINEAR + "output: elsewhere/x\n")
    assert run("merge", "recipe.yaml").stdout == "elsewhere/x\n"
    assert run("merge", "recipe.yaml", "given").stdout == "given\n"
    assert not (folder / "merged").exists()


def test_the_default_output_is_relative_to_the_working_directory(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipe.yaml").rename(folder / "recipes/mine.yaml")
    assert run("merge", "recipes/mine.yaml").stdout == "merged/mine\n"
    assert (folder / "merged/mine").is_dir()


@pytest.mark.usefixtures("folder")
def test_the_same_plan_again_is_already_there() -> None:
    run("merge", "recipe.yaml", "out")
    before = Path("out/model.safetensors").stat().st_mtime_ns
    result = run("merge", "recipe.yaml", "out")
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert result.stderr.startswith("already there")
    assert answer(run("merge", "recipe.yaml", "out", "--json"))["already_there"] is True
    assert Path("out/model.safetensors").stat().st_mtime_ns == before


def test_another_plan_is_refused_unless_it_may_overwrite(folder: Path) -> None:
    run("merge", "recipe.yaml", "out")
    (folder / "recipe.yaml").write_text(LINEAR.replace("{model: b}", "{model: b, parameters: {weight: 3}}"))
    assert "--overwrite" in refusal(run("merge", "recipe.yaml", "out"))
    assert load_file("out/model.safetensors")["w"][0, 0] == 2.0
    assert run("merge", "recipe.yaml", "out", "--overwrite").exit_code == 0
    assert load_file("out/model.safetensors")["w"][0, 0] == 2.5


@pytest.mark.usefixtures("folder")
def test_json_is_one_object() -> None:
    found = answer(run("merge", "recipe.yaml", "out", "--json"))
    assert found["out"] == "out"
    assert (found["already_there"], found["tensors"], found["bytes_written"]) == (False, 2, 68)
    assert (found["resumed_bytes"], found["warnings"]) == (0, [])
    assert found["digest"] == json.loads(Path("out/merge.lock.json").read_text())["plan"]


@pytest.mark.usefixtures("folder")
def test_max_shard_size_splits_the_output() -> None:
    run("merge", "recipe.yaml", "out", "--max-shard-size", "50")
    assert sorted(path.name for path in Path("out").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_seed_stands_in_for_the_recipes(folder: Path) -> None:
    save(folder / "base", {"w": torch.zeros(3, 4), "layers.0.v": torch.zeros(5)})
    text = LINEAR.replace("linear", "dare_linear") + "base_model: base\n"
    (folder / "recipe.yaml").write_text(text.replace("weight: 1", "weight: 1, density: 0.5"))
    digests = {seed: answer(run("plan", "recipe.yaml", "--json", "--seed", seed))["digest"] for seed in ("0", "1")}
    assert digests["0"] == answer(run("plan", "recipe.yaml", "--json"))["digest"] != digests["1"]
    run("merge", "recipe.yaml", "out", "--seed", "1")
    assert json.loads(Path("out/merge.lock.json").read_text())["recipe"]["seed"] == 1


def test_nan_warn_goes_on_and_says_so(folder: Path) -> None:
    save(folder / "c", {"w": torch.full((3, 4), torch.nan), "layers.0.v": torch.ones(5)})
    (folder / "recipe.yaml").write_text(LINEAR.replace("model: b", "model: c"))
    assert "w of c" in refusal(run("merge", "recipe.yaml", "out"))
    result = run("merge", "recipe.yaml", "out", "--nan", "warn", "-q")
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert result.stderr == "warning: w of c holds NaN or infinity\n"


# ------------------------------------------------------------------ plan


def test_dry_run_shows_the_plan_and_does_nothing(folder: Path) -> None:
    result = run("merge", "recipe.yaml", "--dry-run")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line[:1].isalpha())
    assert lines["read"] == "136 B"
    assert lines["write"] == "68 B in 1 file at merged/recipe"
    assert lines["tensors"] == "2 linear"
    assert lines["dropped"] == "nothing"
    assert "free disk" in result.stdout and "enough" in result.stdout and "peak memory" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "recipe.yaml"]
    assert run("plan", "recipe.yaml").stdout.splitlines()[:4] == result.stdout.splitlines()[:4]


def test_dry_run_names_the_dropped_tensors(folder: Path) -> None:
    save(folder / "c", {"w": torch.ones(3, 4), "layers.0.v": torch.ones(5), "rotary_emb.inv_freq": torch.ones(2)})
    (folder / "recipe.yaml").write_text(LINEAR.replace("model: b", "model: c"))
    assert "dropped: c: rotary_emb.inv_freq: " in run("plan", "recipe.yaml").stdout
    (dropped,) = answer(run("plan", "recipe.yaml", "--json"))["dropped"]
    assert (dropped["model"], dropped["tensor"]) == ("c", "rotary_emb.inv_freq")


@pytest.mark.usefixtures("folder")
def test_verbose_plans_list_every_tensor() -> None:
    rows = [line.split() for line in run("plan", "recipe.yaml", "-v").stdout.splitlines()]
    assert ["w", "[3,", "4]", "float32", "linear", "-", "weight", "1,", "1"] in rows
    assert ["layers.0.v", "[5]", "float32", "linear", "0", "of", "0-0", "weight", "1,", "1"] in rows
    result = run("merge", "recipe.yaml", "out", "-v")
    assert result.stdout == "out\n"
    assert "layers.0.v" in result.stderr


@pytest.mark.usefixtures("folder")
def test_plan_as_json() -> None:
    found = answer(run("plan", "recipe.yaml", "out", "--json", "--threads", "3", "--memory", "1GB"))
    assert (found["out"], found["threads"], found["memory"]) == ("out", 3, 10**9)
    assert (found["bytes_read"], found["bytes_written"], found["methods"]) == (136, 68, {"linear": 2})
    assert found["enough_disk"] is True
    assert 0 < found["peak_memory"] <= 10**9


@pytest.mark.usefixtures("folder")
def test_memory_that_cannot_do_is_refused_beforehand() -> None:
    for command in (["plan", "recipe.yaml"], ["merge", "recipe.yaml", "out"]):
        assert "--memory" in refusal(run(*command, "--memory", "500"))
    assert not Path("out").exists() and not Path("out.partial").exists()


# ------------------------------------------------------------------ errors


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("merge_metod: linear", "merge_method"),
        (LINEAR.replace("linear", "liner"), "did you mean linear?"),
        (LINEAR.replace("weight", "wieght"), "did you mean weight?"),
        (LINEAR + "dtype: bfloat61\n", "did you mean bfloat16?"),
        (LINEAR.replace("model: b", "model: nowhere"), "nowhere"),
        ("merge_method: [", "line "),
    ],
)
def test_a_wrong_recipe_is_one_message_with_a_hint(wrong: str, expected: str) -> None:
    Path("recipe.yaml").write_text(wrong)
    assert expected in refusal(run("merge", "recipe.yaml", "out"))
    assert not Path("out").exists() and not Path("out.partial").exists()


@pytest.mark.usefixtures("folder")
def test_files_that_are_not_there_are_named() -> None:
    assert "nowhere.yaml" in refusal(run("merge", "nowhere.yaml"))
    assert "nowhere" in refusal(run("inspect", "nowhere"))
    assert "nowhere" in refusal(run("verify", "nowhere"))


@pytest.mark.parametrize("option", [["--memory", "5B"], ["--memory", "-1"], ["--threads", "0"], ["--nan", "no"]])
def test_wrong_options_are_usage_errors(option: list[str]) -> None:
    result = run("merge", "recipe.yaml", *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option[0] in result.stderr


# ------------------------------------------------------------------ verify, inspect, methods


@pytest.mark.usefixtures("folder")
def test_verify_says_good_or_names_the_differences() -> None:
    run("merge", "recipe.yaml", "out")
    result = run("verify", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("out: good")
    with Path("out/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    result = run("verify", "out")
    assert result.exit_code == 1
    assert "was changed" in result.stdout and "1 difference" in result.stdout
    found = json.loads(run("verify", "out", "--json").stdout)
    assert found["good"] is False and len(found["problems"]) == 1


@pytest.mark.usefixtures("folder")
def test_verify_needs_a_lock() -> None:
    assert "merge.lock.json" in refusal(run("verify", "a"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("key", ["files", "headers", "segments", "tensors", "w", "shape", "dtype", "file", "xxh3"])
def test_verify_refuses_a_lock_that_lacks_something(key: str) -> None:
    run("merge", "recipe.yaml", "out")
    lock = json.loads(Path("out/merge.lock.json").read_text())
    if key == "w":
        lock["tensors"]["w"] = None
    else:
        places = (lock, lock["common"], lock["tensors"]["w"])
        del next(place for place in places if key in place)[key]
    Path("out/merge.lock.json").write_text(json.dumps(lock))
    assert "out/merge.lock.json is damaged" in refusal(run("verify", "out"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("more", [[], ["0" * 32] * 2])
def test_verify_wants_one_digest_for_each_segment(more: list[str]) -> None:
    run("merge", "recipe.yaml", "out")
    lock = json.loads(Path("out/merge.lock.json").read_text())
    lock["tensors"]["w"]["xxh3"] = [*lock["tensors"]["w"]["xxh3"], *more] if more else []
    Path("out/merge.lock.json").write_text(json.dumps(lock))
    result = run("verify", "out")
    assert (result.exit_code, result.stdout.splitlines()[:2]) == (1, ["merge.lock.json was changed", "w was changed"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", ["a", "a/model.safetensors"])
def test_inspect_lists_tensors_and_totals(path: str) -> None:
    rows = [line.split() for line in run("inspect", path).stdout.splitlines()]
    assert ["w", "[3,", "4]", "float32", "48", "B"] in rows
    assert ["all", "2", "17", "68", "B"] in rows
    found = answer(run("inspect", path, "--json"))
    assert {t["name"]: (t["shape"], t["dtype"], t["bytes"]) for t in found["tensors"]} == {
        "w": ([3, 4], "float32", 48),
        "layers.0.v": ([5], "float32", 20),
    }
    assert (found["numbers"], found["bytes"]) == (17, 68)


@pytest.mark.usefixtures("folder")
def test_inspect_gives_the_content_when_asked() -> None:
    content = open_checkpoint("a").content
    assert run("inspect", "a", "--content").stdout.endswith(f", content {content}\n")
    assert answer(run("inspect", "a", "--content", "--json"))["content"] == content
    assert content not in run("inspect", "a").stdout


def test_methods_lists_all_and_describes_one() -> None:
    rows = [row.split()[:2] for row in run("methods").stdout.splitlines()[1:]]
    assert rows == [[kind, name] for kind, methods in all_methods().items() for name in methods]
    page = run("methods", "ties").stdout
    assert METHODS["ties"].source in page
    assert all(parameter.doc in page for parameter in METHODS["ties"].parameters)
    assert [row.split()[:5] for row in page.splitlines() if row.startswith("density")] == [
        ["density", "per", "model", "1.0", "float"]
    ]
    assert "did you mean ties?" in refusal(run("methods", "tise"))


def test_a_name_of_two_kinds_is_described_as_both() -> None:
    page = run("methods", "fisher").stdout
    assert [page.count(all_methods()[kind]["fisher"].summary) for kind in ("merge", "stats")] == [1, 1]
    assert list(answer(run("methods", "fisher", "--json"))) == ["merge", "stats"]


def test_methods_as_json() -> None:
    everything = answer(run("methods", "--json"))
    assert {kind: list(methods) for kind, methods in everything.items()} == {
        k: list(m) for k, m in all_methods().items()
    }
    one = answer(run("methods", "linear", "--json"))
    assert one == {"merge": {"linear": everything["merge"]["linear"]}}
    assert one["merge"]["linear"]["parameters"][0] == {
        "name": "weight",
        "per_input": True,
        "default": "required",
        "values": "float",
        "meaning": METHODS["linear"].parameters[0].doc,
    }


# ------------------------------------------------------------------ processes


def sparse(folder: Path, tensors: int = 8, numel: int = 1 << 22) -> None:
    """A checkpoint of zeros that takes no room on the disk: a header, then a hole."""
    size = 4 * numel
    entries = {
        f"w{i}": {"dtype": "F32", "shape": [numel], "data_offsets": [i * size, (i + 1) * size]} for i in range(tensors)
    }
    header = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + tensors * size)


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        sparse(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    process = start(tmp_path, "merge", "recipe.yaml", "out", "--threads", "1")
    journal = tmp_path / "out.partial/merge.journal"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "interrupted: the finished part is in out.partial; run the same command again to go on\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    assert run("merge", "recipe.yaml", "out", "-q").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "recipe.yaml"]


def test_the_bar_is_shown_on_a_terminal_only(folder: Path) -> None:
    piped = start(folder, "merge", "recipe.yaml", "out2")
    printed, shown = on_a_terminal(folder, "merge", "recipe.yaml", "out")
    assert printed == "out\n"
    assert b"merging:" in shown and b"wrote 2 tensors" in shown
    stdout, stderr = piped.communicate(timeout=60)
    assert (piped.returncode, stdout) == (0, "out2\n")
    assert "merging" not in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("how", [["-m", "mergekit_lfm"], [str(ROOT / "cli.py")]])
def test_other_ways_to_start_it(folder: Path, how: list[str]) -> None:
    command = [sys.executable, *how, "inspect", "a", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bytes"] == 68


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *(("50KB", 50_000), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("3GiB", 3 << 30), ("1000", 1000), (7, 7)),
        *(("5G", 5 * 10**9), (" 500m ", 500_000_000), ("2 Gi", 2 << 30), ("1t", 10**12)),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "5B", "5P", "5i", "-1", "0", "1e9", "GB", "1.2.3MB", "0.1"])
def test_texts_that_are_not_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_five_billion_bytes_are_not_written_as_five() -> None:
    with pytest.raises(PlanError, match=r"found '5 b', .*; billions of bytes are 5GB"):
        parse_size("5 b")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (99_950, "100 KB"), (999_499, "999 KB"), (999_500, "1.00 MB")],
)
def test_sizes_are_written_with_three_digits(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
    assert format_size(nbytes * 10**15).endswith("TB") or nbytes == 0


def test_verbose_lists_layers_in_the_order_of_their_numbers(folder: Path) -> None:
    for name in "ab":
        tensors = {f"layers.{layer}.w": torch.ones(2) for layer in (10, 2, 1)}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    rows = [line.split()[0] for line in run("plan", "recipe.yaml", "-v").stdout.splitlines() if line.startswith("lay")]
    assert rows == ["layers.1.w", "layers.2.w", "layers.10.w"]


def test_both_commands_print_the_versions() -> None:
    for arguments in (["--version"], ["merge", "--version"]):
        assert run(*arguments).stdout == f"mergekit_lfm {__version__}, torch {version('torch')}\n"


@click.command(cls=Command)
@click.argument("number", type=int)
def wait_for_a_signal(number: int) -> None:
    """A command to which a signal is sent while it runs; prints a line if it goes on."""
    os.kill(os.getpid(), number)
    click.echo("went on")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_every_command_as_ctrl_c_does(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    for _ in range(2):
        ended = CliRunner(catch_exceptions=False).invoke(wait_for_a_signal, [str(int(number))])
        assert (ended.exit_code, ended.stdout, ended.stderr) == (code, "", "interrupted\n")
    assert signal.getsignal(number) is before


def test_nohup_is_respected() -> None:
    """It starts its command with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ended = CliRunner(catch_exceptions=False).invoke(wait_for_a_signal, [str(int(signal.SIGHUP))])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (ended.exit_code, ended.stdout) == (0, "went on\n")
