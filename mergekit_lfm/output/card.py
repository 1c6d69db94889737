"""The model card of a merge: what the Hub reads of it (its base models, license, tags), its models, and its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lfm.version import __version__

CARD = "README.md"
KEPT = "MERGE.md"  # where our card goes beside one that was edited on the Hub
LICENSE = ("license", "license_name", "license_link")


def stated_license(folder: Path) -> dict[str, str]:
    """What the card of a model in a folder says of its license, {} where it says nothing."""
    front = front_matter(folder / CARD) if folder.is_dir() else {}
    said = {key: front[key] for key in LICENSE if isinstance(front.get(key), str)}
    return said if "license" in said else {}


def front_matter(card: Path) -> dict[str, Any]:
    """The mapping at the top of a model card, {} where there is none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    opening, _, rest = text.partition("---\n")
    if opening.strip():
        return {}
    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except (yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def without_front_matter(card: str) -> str:
    """The text of a model card alone."""
    return card.partition("\n---\n")[2].lstrip("\n") if card.startswith("---\n") else card


def model_card(
    *,
    method: str,
    numbers: str,
    models: Mapping[str, str],
    licenses: Mapping[str, Mapping[str, str]],
    repos: list[str],
    library: str,
    recipe: str,
    lock: str,
) -> str:
    """The card's text.

    method: its name and source; numbers: how large the result is. models: by name, with what they are besides in the
    merge ("" or " (base)"); licenses: what each of them states; repos: those that are on the Hub; recipe: in YAML.
    """
    front: dict[str, Any] = _license(licenses)
    front |= {"base_model": repos, "base_model_relation": "merge"} if repos else {}
    front |= {"library_name": library, "tags": ["merge", "mergekit_lfm"]}
    stated = any(licenses.values())
    lines = "\n".join(
        f"- {name}{role}" + (f", license: {_named(licenses[name])}" if stated else "") for name, role in models.items()
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# Merged model\n\n"
        f"Made with mergekit_lfm {__version__} by {method}.\n\n"
        f"{numbers}.\n\n"
        f"## Models\n\n{lines}\n\n"
        f"## Recipe\n\n```yaml\n{recipe}```\n\n"
        f"`{lock}` has the identity of every input and a digest of every tensor; `mergekit-lfm verify` checks them.\n"
    )


def _license(licenses: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What all models state alike; "other" where they differ or some state nothing, for a human to look at."""
    stated = [dict(license) for license in licenses.values()]
    if not any(stated):
        return {}
    return stated[0] if all(license == stated[0] for license in stated) else {"license": "other"}


def _named(license: Mapping[str, str]) -> str:
    return license.get("license_name") or license.get("license") or "not stated"
