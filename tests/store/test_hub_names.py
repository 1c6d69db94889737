"""Texts that are names of models on the Hub, and texts that are not."""

from pathlib import Path

import pytest

from mergekit_lfm.store.hub import HubName, display_name, hub_name, repository


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
