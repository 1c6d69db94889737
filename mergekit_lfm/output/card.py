"""The model card of an output: the front matter for the Hub, its models, methods and edited facts, and its recipe.

Text from inputs cannot become anything else in it: each is one line, bounded, without secrets, escaped for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.text import printable_line
from mergekit_lfm.store.files import parse_json, read_text
from mergekit_lfm.store.folder import is_outside
from mergekit_lfm.store.yaml import read_yaml
from mergekit_lfm.version import __version__

CARD = "README.md"
CONFIG = "mergekit_config.yml"  # the recipe under the name that tools for the Hub look for
OWN_CARD = "MERGE.md"  # our card's name beside one that was edited on the Hub
LICENSE = ("license", "license_name", "license_link")
LONGEST = 200  # characters of a text from an input
LONGEST_IN_RECIPE = 1000  # of a text in the recipe, such as a pattern
SHOWN_FACTS = 20
NOT_JUDGED = "Their scores were not taken; `mergekit-lfm eval` takes them."
ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{4,5})\b")
MARKDOWN = re.compile(r"[\\`*\[\]<>|&]|(?<=:)/(?=/)")  # what begins markup or a link within a line


def read_license(folder: Path) -> dict[str, str]:
    """The license entries in the card of a model's folder, {} without a license."""
    card = folder / CARD
    front = front_matter(card) if folder.is_dir() and not is_outside(card, folder) else {}
    entries = {key: bound(front[key], LONGEST) for key in LICENSE if isinstance(front.get(key), str)}
    return entries if "license" in entries else {}


def front_matter(card: Path) -> dict[str, Any]:
    """The mapping at the top of a model card, {} without a readable one."""
    try:
        text = read_text(card)
    except (OSError, ValueError):
        return {}
    opening, _, rest = text.partition("---\n")
    if opening.strip():
        return {}
    try:
        front = read_yaml(rest.partition("\n---")[0], str(card))
    except PlanError:
        return {}
    return front if isinstance(front, dict) else {}


def without_front_matter(card: str) -> str:
    """The text of a model card without its front matter."""
    return card.partition("\n---\n")[2].lstrip("\n") if card.startswith("---\n") else card


def bound(text: str, longest: int) -> str:
    """The text in one line of at most so many characters."""
    line = printable_line(text)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def as_markdown(text: str) -> str:
    """The text as one line of Markdown that shows it."""
    return MARKDOWN.sub(r"\\\g<0>", bound(text, LONGEST))


def _bound_all(value: Any) -> Any:
    """A recipe's value with all texts in it bound."""
    if isinstance(value, str):
        return bound(value, LONGEST_IN_RECIPE)
    if isinstance(value, Mapping):
        return {_bound_all(key): _bound_all(each) for key, each in value.items()}
    return [_bound_all(each) for each in value] if isinstance(value, list | tuple) else value


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe in YAML, with all texts in it bound."""
    return yaml.safe_dump(_bound_all(recipe), sort_keys=False, width=1 << 30)


def code_block(text: str, language: str) -> str:
    """The text between fences that are longer than any in it."""
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text}{fence}"


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a card: its name, its role ("" or " (base)"), its license entries, its repository on the Hub."""

    name: str
    role: str
    license: Mapping[str, str]
    repo: str | None = None

    @property
    def line(self) -> str:
        """The model as Markdown: a link to its page if it has one."""
        shown = as_markdown(self.name)
        return (f"[{shown}](https://huggingface.co/{self.repo})" if self.repo else shown) + self.role


@dataclass(frozen=True, slots=True)
class Loader:
    """How a folder is loaded: the library's name for the Hub, "" if none fits, and lines of Python."""

    library: str
    code: str


def find_loader(name: str, files: Mapping[str, bytes], shards: Sequence[str]) -> Loader:
    """How to load an output with these files beside its shards. name: the output's."""
    place = repr(bound(name, LONGEST))
    config = _config_of(files)
    if "modules.json" in files:
        code = f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({place})"
        return Loader("sentence-transformers", code)
    if (kind := config.get("_class_name")) and str(kind).isidentifier():
        return Loader("diffusers", f"from diffusers import {kind}\n\nmodel = {kind}.from_pretrained({place})")
    if "config.json" in files:
        named = next(iter(config.get("architectures") or []), None)
        known = isinstance(named, str) and named.isidentifier() and "auto_map" not in config
        kind = named if known else "AutoModel"
        lines = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({place})"]
        if any("tokenizer" in file for file in files):
            lines[:1] = [f"from transformers import AutoTokenizer, {kind}"]
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
        return Loader("transformers", "\n".join(lines))
    path = repr(f"{bound(name, LONGEST)}/{shards[0]}")
    return Loader("", f"from safetensors.torch import load_file\n\ntensors = load_file({path})")


def _config_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config = parse_json(files.get("config.json", b"{}"), "config.json")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def model_card(
    *,
    name: str,
    methods: Mapping[str, str],
    numbers: str,
    sources: Sequence[Source],
    facts: Sequence[str],
    loader: Loader,
    recipe: str,
    lock: str,
) -> str:
    """The card's text.

    name: the output's, its title. methods: those that made it, each with its source, which is linked if it is on arXiv.
    numbers: the size of the result. facts: those that edits taught it, a line each. recipe: its YAML. lock: file name.
    """
    repos = list(dict.fromkeys(source.repo for source in sources if source.repo))
    front: dict[str, Any] = _license([source.license for source in sources])
    relation = "merge" if len(sources) > 1 or not facts else "finetune"  # of one model, with other facts
    front |= {"base_model": repos, "base_model_relation": relation} if repos else {}
    front |= {"library_name": loader.library} if loader.library else {}
    front |= {"tags": ["merge" if relation == "merge" else "model-editing", "mergekit_lfm"]}
    stated = any(source.license for source in sources)
    lines = "\n".join(
        f"- {source.line}" + (f", license: {as_markdown(_label(source.license))}" if stated else "")
        for source in sources
    )
    by = ", ".join(f"`{method}`" + (f" ({_linked(paper)})" if paper else "") for method, paper in methods.items())
    here = "Its folder, or its name on the Hub, in place of the name:"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {as_markdown(name)}\n\n"
        f"Made with mergekit_lfm {__version__} by {by}.\n\n"
        f"{numbers}.\n\n"
        f"## Models\n\n{lines}\n\n"
        f"{_facts_section(facts)}"
        f"## To load it\n\n{here}\n\n{code_block(loader.code + chr(10), 'python')}\n\n"
        f"## Recipe\n\n{code_block(recipe, 'yaml')}\n\n"
        f"`{lock}` has the identity of every input and a digest of every tensor; `mergekit-lfm verify` checks them.\n"
    )


def _linked(paper: str) -> str:
    """The source of a method with links to arXiv."""
    return ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", as_markdown(paper))


def _facts_section(facts: Sequence[str]) -> str:
    if not facts:
        return ""
    lines = "\n".join(f"- {as_markdown(fact)}" for fact in facts[:SHOWN_FACTS])
    more = f"\n- and {len(facts) - SHOWN_FACTS} more" if len(facts) > SHOWN_FACTS else ""
    count = "one fact" if len(facts) == 1 else f"{len(facts)} facts"
    return f"## Edited facts\n\nIt was edited to say {count}:\n\n{lines}{more}\n\n{NOT_JUDGED}\n\n"


def with_scores(card: str, scores: Mapping[str, float | None], legend: str) -> str:
    """The card with the scores of its edited facts, shares by name, where it says that they were not taken."""
    head = "| " + " | ".join(scores) + " |\n|" + "--:|" * len(scores)
    row = "| " + " | ".join("-" if share is None else f"{share:.1%}" for share in scores.values()) + " |"
    return card.replace(NOT_JUDGED, f"{head}\n{row}\n\n{legend}", 1)


def _license(licenses: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The license that all models share; "other" if they differ or some state none, for a human to look at."""
    stated = [dict(license) for license in licenses]
    if not any(stated):
        return {}
    return stated[0] if all(license == stated[0] for license in stated) else {"license": "other"}


def _label(license: Mapping[str, str]) -> str:
    return license.get("license_name") or license.get("license") or "not stated"
