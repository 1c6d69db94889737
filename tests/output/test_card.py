"""The model card: text from inputs stays text, whatever it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import run
from models import files_of, save_checkpoint
from safetensors.torch import save_file

from mergekit_lfm import merge
from mergekit_lfm.output.card import (
    LONGEST,
    NOT_JUDGED,
    Source,
    find_loader,
    front_matter,
    model_card,
    read_license,
    recipe_text,
    with_scores,
)
from mergekit_lfm.output.lock import verify

HOSTILE = [
    "a\n---\n\n# Free prizes",
    "a\n```\n<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/pixel.png)",
    "<img src=x onerror=alert(1)>",
    "a\x1b[2J\u202eb",
    "a | b * c ` d \\ e",
    "see https://evil.example",
    "hf_" + "a" * 34,
    "x" * 10_000,
]


def card_of(name: str, recipe: object = None, title: str = "merged") -> str:
    return model_card(
        name=title,
        methods={"linear": "Wortsman et al. 2022, Model soups, arXiv 2203.05482"},
        numbers="1 tensor",
        sources=[Source(name, " (base)", {"license": "other", "license_name": name}), Source("b", "", {})],
        facts=[name] if recipe == name else ["plain"],
        loader=find_loader(title, {"config.json": b"{}"}, ["model.safetensors"]),
        recipe=recipe_text({"models": [{"model": name}], "more": recipe}),
        lock="merge.lock.json",
    )


def shape_of(card: str) -> list[str]:
    """The card's lines, without what stands for a name."""
    return [re.sub(r"^(- model: |- ).*|^more: .*|^`(?=`{3,})", r"\1", line) for line in card.splitlines()]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_adds_nothing_but_its_text_to_a_card(name: str) -> None:
    card = card_of(name, name)
    assert shape_of(card) == shape_of(card_of("plain", "plain"))
    listed = next(line for line in card.splitlines() if line.startswith("- "))
    assert not re.search(r"(?<!\\)[\[\]<>`*|]|https://|hf_a", listed) and listed.isprintable()
    assert len(listed) <= 4 * LONGEST + 100


def test_a_plain_name_stays_as_it_is() -> None:
    assert "- org/a_b-c.d@v1 (base), license: org/a_b-c.d@v1\n- b, license: not stated\n" in card_of("org/a_b-c.d@v1")


@pytest.mark.parametrize("text", ["```", "a ``` b", "`" * 9, "x " * 90 + "``` y", "a\n```\nb"])
def test_no_text_of_a_recipe_ends_its_block(text: str) -> None:
    card = card_of("a", text)
    fence = re.search(r"^(`{3,})yaml$", card, re.MULTILINE)
    assert fence is not None
    block, end, rest = card.partition(f"{fence[1]}yaml\n")[2].partition(f"\n{fence[1]}\n")
    assert end and fence[1] not in block and rest.startswith("\n`merge.lock.json` has")
    shown = text.replace("\n", "\\n")
    assert yaml.safe_load(block) == {"models": [{"model": "a"}], "more": shown}


def test_a_long_recipe_keeps_a_line_for_each_text() -> None:
    card = card_of("a", {"p": ["word " * 100, 1, None, True], "q": 0.5})
    assert f"  - '{'word ' * 100}'\n  - 1\n  - null\n  - true\n  q: 0.5\n" in card


def test_the_license_of_an_input_is_one_line(tmp_path: Path) -> None:
    front = yaml.safe_dump({"license": "other", "license_name": "a\n\n# b" + "c" * 1000, "license_link": "x"})
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    entries = read_license(tmp_path)
    assert entries["license_name"].startswith("a\\n\\n# bccc") and len(entries["license_name"]) == LONGEST
    assert entries["license_link"] == "x"


def test_a_merge_of_a_folder_with_a_hostile_name_has_a_clean_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "m\n---\n# [x](y)"
    save_checkpoint(Path(name), {"a": torch.ones(2)}, {})
    card = Path(merge({"merge_method": "passthrough", "models": [{"model": name}]}, "out")) / "README.md"
    assert "\n- m\\\\n---\\\\n# \\[x\\](y)\n" in card.read_text()
    assert front_matter(card)["tags"] == ["merge", "mergekit_lfm"]


# ------------------------------------------------------------------ the parts of a card


def merged_card(folder: Path, recipe: dict[str, Any], out: str = "soup-7b") -> str:
    return (Path(merge(recipe, folder / out)) / "README.md").read_text()


def test_the_title_is_the_outputs_name_and_the_method_is_linked(tmp_path: Path) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / name, {"w": torch.ones(2)}, {"architectures": ["LlamaForCausalLM"]})
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    card = merged_card(tmp_path, recipe | {"parameters": {"weight": 1}})
    assert "\n# soup-7b\n" in card
    assert (
        "by `linear` (Wortsman et al. 2022, Model soups, [arXiv 2203.05482](https://arxiv.org/abs/2203.05482))" in card
    )
    assert (
        "\nfrom transformers import LlamaForCausalLM\n\nmodel = LlamaForCausalLM.from_pretrained('soup-7b')\n" in card
    )


@pytest.mark.parametrize(
    ("files", "library", "lines"),
    [
        ({"config.json": b'{"architectures": ["A"]}', "tokenizer.json": b""}, "transformers", "AutoTokenizer, A\n"),
        (
            {"config.json": b'{"architectures": ["A"], "auto_map": {}}'},
            "transformers",
            "AutoModel.from_pretrained('m')",
        ),
        ({"config.json": b'{"architectures": ["os; x"]}'}, "transformers", "AutoModel.from_pretrained('m')"),
        ({"config.json": b"[]"}, "transformers", "AutoModel.from_pretrained('m')"),
        ({"config.json": b"{}", "modules.json": b"[]"}, "sentence-transformers", "SentenceTransformer('m')"),
        ({"config.json": b'{"_class_name": "UNet2DModel"}'}, "diffusers", "UNet2DModel.from_pretrained('m')"),
        ({}, "", "load_file('m/x.safetensors')"),
    ],
)
def test_a_card_names_the_library_that_loads_the_files(files: dict[str, bytes], library: str, lines: str) -> None:
    loader = find_loader("m", files, ["x.safetensors"])
    assert loader.library == library and lines in loader.code
    compile(loader.code, "card", "exec")


def test_without_a_config_no_library_is_named(tmp_path: Path) -> None:
    for name in ("v4", "v5"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "silero.safetensors")
    models = [{"model": str(tmp_path / name / "silero.safetensors")} for name in ("v4", "v5")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    card = merged_card(tmp_path, recipe)
    assert "library_name" not in card
    assert "\n- v4/silero.safetensors\n- v5/silero.safetensors\n" in card


def test_a_model_of_the_hub_is_linked() -> None:
    front = {"base_model": ["org/a"], "base_model_relation": "finetune"}
    card = model_card(
        name="m",
        methods={"memit": "arXiv 2210.07229"},
        numbers="1 tensor",
        sources=[Source("org/a@1234", "", {}, "org/a")],
        facts=["Ada lives in Rome (before: Oslo)"] * 30,
        loader=find_loader("m", {}, ["x.safetensors"]),
        recipe="a: 1\n",
        lock="merge.lock.json",
    )
    assert yaml.safe_load(card.split("---\n")[1]) == front | {"tags": ["model-editing", "mergekit_lfm"]}
    assert "- [org/a@1234](https://huggingface.co/org/a)\n" in card
    assert card.count("- Ada lives in Rome (before: Oslo)\n") == 20 and "\n- and 10 more\n" in card
    assert "It was edited to say 30 facts:" in card and NOT_JUDGED in card


def test_scores_stand_where_they_were_missing() -> None:
    card = with_scores(f"a\n{NOT_JUDGED}\nb", {"EA": 1.0, "SA": None}, "Shares.")
    assert card == "a\n| EA | SA |\n|--:|--:|\n| 100.0% | - |\n\nShares.\nb"


# ------------------------------------------------------------------ the files beside it

RECIPE = """# {place}
merge_method: linear  # a soup
models:
  - model: {place}/a
  - {{model: b}}
parameters: {{weight: 1}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "ab":
        save_checkpoint(tmp_path / name, {f"layers.{i}.weight": torch.ones(2, 2) for i in range(30)}, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_lock_has_the_recipes_own_text_without_folders_of_this_machine(here: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.format(place=here).replace(f"# {here}", "# mine"))
    lock = json.loads((Path(merge("r.yaml", "out")) / "merge.lock.json").read_text())
    assert lock["recipe_text"] == RECIPE.format(place="X").replace("# X", "# mine").replace("X/a", "a")


@pytest.mark.parametrize("comment", ["/home/ada/models/a", "~/models", "hf_" + "a" * 34])
def test_a_recipe_whose_comments_are_private_is_kept_without_its_text(here: Path, comment: str) -> None:
    (here / "r.yaml").write_text(RECIPE.format(place=here).replace(f"# {here}", f"# see {comment}"))
    out = Path(merge("r.yaml", "out"))
    lock = json.loads((out / "merge.lock.json").read_text())
    assert "recipe_text" not in lock and lock["recipe"]["merge_method"] == "linear"
    assert all(comment.encode() not in content for content in files_of(out).values())


def test_tools_of_the_hub_find_the_recipe_under_mergekits_name(here: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.format(place=here))
    out = Path(merge("r.yaml", "out"))
    config = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert (config["merge_method"], [model["model"] for model in config["models"]]) == ("linear", ["a", "b"])
    assert yaml.safe_dump(config, sort_keys=False) in (out / "README.md").read_text()
    assert verify(out) == []
    (out / "mergekit_config.yml").write_text("merge_method: ties\n")
    assert verify(out) == ["mergekit_config.yml was changed"]


@pytest.mark.parametrize(("line", "options"), [("card: false\n", []), ("", ["--no-card"])])
def test_a_card_can_be_left_out(here: Path, line: str, options: list[str]) -> None:
    (here / "r.yaml").write_text(RECIPE.format(place=here) + line)
    assert run("merge", "r.yaml", "out", *options).exit_code == 0
    assert not (here / "out/README.md").exists() and verify(here / "out") == []
    assert "already there" in run("merge", "r.yaml", "out", *options).stderr


def test_the_lock_says_once_the_entries_that_most_tensors_share(here: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.format(place=here))
    out = Path(merge("r.yaml", "out"))
    raw = (out / "merge.lock.json").read_bytes()
    lock = json.loads(raw)
    assert lock["common"] == {"method": "linear", "dtype": "float32", "file": "model.safetensors"}
    assert {key for entry in lock["tensors"].values() for key in entry} == {"shape", "xxh3", "inputs"}
    whole = {name: {**lock["common"], **entry} for name, entry in lock["tensors"].items()}
    assert len(raw) < 0.7 * len(json.dumps({**lock, "tensors": whole}, indent=2))
