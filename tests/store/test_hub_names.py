"""Texts that are names of models on the Hub, and texts that are not."""

from pathlib import Path

import pytest
from helpers_commands import refusal, run

from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.hub import HubName, display_name, hub_name, nearest_name, repository


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("Org-1/a_b.c-2@v1.0", "Org-1/a_b.c-2", "v1.0"),
        ("gpt2@main", "gpt2", "main"),
        ("org/name@" + "0" * 40, "org/name", "0" * 40),
    ],
)
def test_a_name_is_read_and_written_alike(text: str, repo: str, revision: str | None) -> None:
    assert hub_name(text) == HubName(repo, revision)
    assert str(HubName(repo, revision)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/a/b",
        "./a/b",
        "../b",
        "~/b",
        "org/",
        "/name",
        "org/name@",
        "org/name@a b",
        "org/name@a@b",
        "@main",
        "org/na--me",
        "org/na..me",
        "org/name.git",
        "-org/name",
        "org/name-",
        "a" * 97 + "/name",
        "org/mödel",
        "stats/gram.safetensors",
        "models/weights.bin",
        "org/name\n",
        "https://huggingface.co/org/name",
    ],
)
def test_texts_that_are_not_names(text: str) -> None:
    assert hub_name(text) is None


def test_a_folder_in_the_cache_is_called_by_its_models_name() -> None:
    assert display_name(Path("/home/me/hub/models--org--na-me/snapshots") / ("0" * 40)) == "org/na-me@" + "0" * 40
    assert display_name(Path("/home/me/hub/models--gpt2/snapshots") / ("0" * 40)) == "gpt2@" + "0" * 40
    assert display_name(Path("models/a")) == "models/a"


def test_a_repository_to_push_to_has_an_owner_and_no_revision() -> None:
    assert repository("org/name") == "org/name"
    for text in ("name", "name@main", "org/name@main", "a/b/c"):
        with pytest.raises(ValueError, match="expected a repository on the Hub as org/name"):
            repository(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name", "org/name"),
        ("http://www.huggingface.co/org/name/", "org/name"),
        ("https://huggingface.co/org/name?library=transformers#files", "org/name"),
        ("https://huggingface.co/org/name/blob/v1.0/config.json", "org/name@v1.0"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors?download=true", "org/name"),
        ("https://huggingface.co/org/name/tree/refs/pr/3", "org/name@refs/pr/3"),
        ("https://huggingface.co/org/name/commit/" + "0" * 40, "org/name@" + "0" * 40),
        ("https://huggingface.co/gpt2", "gpt2@main"),
        ("hf.co/org/name", "org/name"),
        ("org/name/tree/main", "org/name"),
        ("org/name/", "org/name"),
        ("org/name.git", "org/name"),
        ("models--org--na-me", "org/na-me"),
    ],
)
def test_an_address_is_led_to_its_name(text: str, name: str) -> None:
    assert nearest_name(text) == f"; for this model on the Hub write {name}"
    with pytest.raises(PlanError, match=f"write {name}$"):
        Recipe.parse({"merge_method": "passthrough", "models": [{"model": text}]})


@pytest.mark.parametrize("text", ["https://huggingface.co/datasets/org/name", "a/b/c", "/a/b", "../a", "my model", ""])
def test_nothing_is_near_other_texts(text: str) -> None:
    assert nearest_name(text) == ""


@pytest.mark.parametrize(
    ("cached", "hint"),
    [
        ([], "; on the Hub models are called org/name; one without an owner is written gpt2@main"),
        (["models--gpt2"], "; gpt2 without an owner is in the cache of the Hub: write gpt2@main"),
        (["models--openai-community--gpt2"], "; in the cache of the Hub is openai-community/gpt2: write that"),
        (["models--gpt2-xl", "datasets--gpt2"], "; on the Hub models are called org/name; one without an owner is "),
    ],
)
def test_a_bare_name_is_led_to_the_model_in_the_cache(
    cached: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for folder in cached:
        (tmp_path / folder).mkdir()
    assert nearest_name("gpt2").startswith(hint)


def test_commands_lead_from_an_address_to_the_name() -> None:
    said = refusal(run("inspect", "https://huggingface.co/org/name/tree/main"))
    assert "write org/name" in said
