"""Every command explains itself, with an example that names it, and starts without packages that it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.merge import merge

ROOT = Path(__file__).parents[2]


def commands(group: click.Group, name: str) -> dict[str, click.Command]:
    """The group and all commands in it and in its groups, by the words typed to run them."""
    found: dict[str, click.Command] = {name: group}
    for part, command in group.commands.items():
        inner = f"{name} {part}"
        found |= commands(command, inner) if isinstance(command, click.Group) else {inner: command}
    return found


COMMANDS = commands(main, "mergekit-lfm")
HEAVY = ("torch", "transformers", "numpy", "scipy", "huggingface_hub")
ON_USE = ("pydantic", "yaml", "tqdm", "xxhash")  # needed to work, not to print help


def test_both_installed_names_have_the_main_job() -> None:
    assert main.commands["merge"] is merge


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_summary_an_example_and_every_option_explained(name: str) -> None:
    command = COMMANDS[name]
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    text, _, examples = result.output.partition("\n  Example")
    assert command.help and command.help.split(".")[0] in " ".join(text.split())
    assert (name if command is not merge else "merge ") in examples
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def imported(program: str, cwd: Path) -> set[str]:
    """The packages that are loaded in a fresh interpreter after running `program`."""
    program = (
        f"import json, sys\ntry:\n    {program}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    program += "print('\\n' + json.dumps([name for name in sys.modules if '.' not in name]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def run(*arguments: str) -> str:
    return f"from mergekit_lfm.commands.app import main; main({list(arguments)!r})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its two models, each of one tensor: a header and 8 bytes."""
    folder = tmp_path_factory.mktemp("models")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (folder / "recipe.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    return folder


@pytest.mark.parametrize("arguments", [["--version"], *([*name.split()[1:], "--help"] for name in COMMANDS)])
def test_help_loads_little(arguments: list[str], folder: Path) -> None:
    assert imported(run(*arguments), folder).isdisjoint({*HEAVY, *ON_USE})


@pytest.mark.parametrize(
    "program",
    [
        "import mergekit_lfm",
        run("methods"),
        run("methods", "ties"),
        run("methods", "memit"),
        run("plan", "recipe.yaml"),
        run("merge", "recipe.yaml", "--dry-run", "--json"),
        run("inspect", "a"),
        run("inspect", "a/model.safetensors"),
    ],
)
def test_commands_that_read_only_headers_load_no_torch(program: str, folder: Path) -> None:
    assert imported(program, folder).isdisjoint(HEAVY)


def test_a_merge_loads_torch_but_no_transformers(folder: Path) -> None:
    loaded = imported(run("merge", "recipe.yaml", "out"), folder)
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "huggingface_hub"})
