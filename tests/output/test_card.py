"""The model card: text from inputs stays text, whatever it holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.output.card import LONGEST, front_matter, model_card, read_license

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


def card_of(name: str, recipe: object = None) -> str:
    return model_card(
        method="`linear`",
        numbers="1 tensor",
        models={name: " (base)", "b": ""},
        licenses={name: {"license": "other", "license_name": name}, "b": {}},
        repos=[],
        library="transformers",
        recipe={"models": [{"model": name}], "more": recipe},
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
