"""The model card of a merge: the front matter for the Hub (base models, license, tags), its models, and its recipe.

Text from inputs cannot become anything else in it: each is one line, bounded, without secrets, escaped for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.text import printable_line
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.folder import is_outside
from mergekit_lfm.store.yaml import read_yaml
from mergekit_lfm.version import __version__

CARD = "README.md"
OWN_CARD = "MERGE.md"  # our card's name beside one that was edited on the Hub
LICENSE = ("license", "license_name", "license_link")
LONGEST = 200  # characters of a text from an input
LONGEST_IN_RECIPE = 1000  # of a text in the recipe, such as a pattern
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


def _markdown(text: str) -> str:
    """The text as one line of Markdown that shows it."""
    return MARKDOWN.sub(r"\\\g<0>", bound(text, LONGEST))


def _bound_all(value: Any) -> Any:
    """A recipe's value with all texts in it bound."""
    if isinstance(value, str):
        return bound(value, LONGEST_IN_RECIPE)
    if isinstance(value, Mapping):
        return {_bound_all(key): _bound_all(each) for key, each in value.items()}
    return [_bound_all(each) for each in value] if isinstance(value, list | tuple) else value


def _recipe_block(recipe: Mapping[str, Any]) -> str:
    """The recipe as a block of YAML, between fences that are longer than any in it."""
    text = yaml.safe_dump(_bound_all(recipe), sort_keys=False, width=1 << 30)
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}yaml\n{text}{fence}"


def model_card(
    *,
    method: str,
    numbers: str,
    models: Mapping[str, str],
    licenses: Mapping[str, Mapping[str, str]],
    repos: list[str],
    library: str,
    recipe: Mapping[str, Any],
    lock: str,
) -> str:
    """The card's text.

    method: its name and source; numbers: the size of the result. models: names with their roles in the merge ("" or
    " (base)"); licenses: the license entries of each; repos: the models on the Hub; lock: file name.
    """
    front: dict[str, Any] = _license(licenses)
    front |= {"base_model": repos, "base_model_relation": "merge"} if repos else {}
    front |= {"library_name": library, "tags": ["merge", "mergekit_lfm"]}
    stated = any(licenses.values())
    lines = "\n".join(
        f"- {_markdown(name)}{role}" + (f", license: {_markdown(_label(licenses[name]))}" if stated else "")
        for name, role in models.items()
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# Merged model\n\n"
        f"Made with mergekit_lfm {__version__} by {method}.\n\n"
        f"{numbers}.\n\n"
        f"## Models\n\n{lines}\n\n"
        f"## Recipe\n\n{_recipe_block(recipe)}\n\n"
        f"`{lock}` has the identity of every input and a digest of every tensor; `mergekit-lfm verify` checks them.\n"
    )


def _license(licenses: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The license that all models share; "other" if they differ or some state none, for a human to look at."""
    stated = [dict(license) for license in licenses.values()]
    if not any(stated):
        return {}
    return stated[0] if all(license == stated[0] for license in stated) else {"license": "other"}


def _label(license: Mapping[str, str]) -> str:
    return license.get("license_name") or license.get("license") or "not stated"
