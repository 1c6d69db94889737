"""Helpers for tests of the Hub: a server for the real client, whatever was imported before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from models import files_of

RECIPE = """\
merge_method: linear
models: [{model: org/a}, {model: org/b}]
parameters: {weight: 1}
"""
REPO = "me/merged"


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The variables that lead another process to the server, with its cache below `home`."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if server.xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def lead_to(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead the client of this process to the server, and its cache and stored tokens below `home`."""
    for name, value in environment(server, home).items():
        monkeypatch.setenv(name, value)
    constants = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not server.xet,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, constant in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", constant)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that stores large files by git-lfs; the client asks it."""
    yield from _serving(HubServer(tmp_path / "server"), tmp_path / "client", monkeypatch)


@pytest.fixture
def xet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that stores large files by xet; the client asks it."""
    yield from _serving(HubServer(tmp_path / "xet-server", xet=True), tmp_path / "xet-client", monkeypatch)


def _serving(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # documented, but not in its __all__

    close_session()
    with server:
        lead_to(server, home, monkeypatch)
        try:
            yield server
        finally:
            close_session()  # its open connections would keep the server waiting


def fast_retries(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make the client's waits between retries take no time. Returns the list of these waits, in seconds."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    return waits


def prepare(server: HubServer, place: Path) -> None:
    """Models org/a and org/b on the Hub, and a recipe that averages them."""
    from helpers_faults import llama_tensors, near, save_model

    base = llama_tensors(0)
    for name, tensors in (("a", base), ("b", near(base, 1))):
        save_model(place / name, tensors)
        server.create(f"org/{name}", files_of(place / name))
        shutil.rmtree(place / name)
    (place / "recipe.yaml").write_text(RECIPE)
