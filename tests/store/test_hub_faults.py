"""Failures on the way to the Hub and back: one message each, nothing half made, and the same command continues.

Transfers here are by HTTP, as the Hub stores large files without xet, where they can be cut at any byte.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from helpers_commands import answer, run, start
from helpers_hub import REPO, environment, fast_retries, prepare
from hub_server import TOKEN, HubServer
from models import files_of

from mergekit_lfm import merge, push

AGAIN = "run the same command again"

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits between its retries, which take no time."""
    return fast_retries(monkeypatch)


@pytest.fixture
def folder(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working directory, with a recipe of two models on the Hub."""
    place = tmp_path / "here"
    place.mkdir()
    prepare(hub, place)
    monkeypatch.chdir(place)
    return place


def refused(*command: str) -> str:
    """The one message of a command that failed, after the client's words on its retries. No message shows a secret."""
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    before, mark, message = result.stderr.partition("error: ")
    assert mark and "error: " not in message and message.count("\n") == 1
    assert all(re.search("Retry|thrown|Rate limited|downloading|wrote", line) for line in before.splitlines())
    assert TOKEN not in result.stderr and "Signature" not in result.stderr and "Traceback" not in result.stderr
    return message


# ------------------------------------------------------------------ pushing


def test_somebody_else_commits_in_the_middle_of_the_upload(hub: HubServer, folder: Path) -> None:
    merge("recipe.yaml", "out")
    push("out", REPO)
    (folder / "out/notes.txt").write_text("new\n")
    hub.fault("POST", "/preupload/", before=lambda: hub.commit(REPO, {"theirs.txt": b"1"}))
    message = refused("push", "out", REPO)
    assert f"somebody else changed {REPO} in the meantime, so nothing was pushed" in message
    assert "notes.txt" not in hub.files(REPO)
    assert answer(run("push", "out", REPO, "--json"))["files"] == ["notes.txt"]
    assert hub.files(REPO)["theirs.txt"] == b"1"


def test_an_upload_that_is_cut_once_goes_on_by_itself(
    hub: HubServer,
) -> None:
    hub.fault("PUT", ".", cut_after=1000, times=1)
    assert run("merge", "recipe.yaml", "out", "--push-to", REPO, "--verify").exit_code == 0
    assert len([r for r in hub.requests if r.method == "PUT"]) >= 2


def test_an_upload_that_is_cut_for_good_leaves_no_trace(hub: HubServer, folder: Path) -> None:
    hub.fault("PUT", ".", cut_after=1000, times=None)
    message = refused("merge", "recipe.yaml", "out", "--push-to", REPO)
    assert f"the connection to the Hub at {hub.url} failed for {REPO}" in message and AGAIN in message
    assert "model.safetensors" not in hub.files(REPO)
    assert (folder / "out/model.safetensors").exists()  # the merge is done, and is not done again
    hub.clear_faults()
    said = answer(run("merge", "recipe.yaml", "out", "--push-to", REPO, "--json"))
    assert said["already_there"] and said["pushed"]["commit"] == hub.head(REPO)
    assert hub.files(REPO)["model.safetensors"] == (folder / "out/model.safetensors").read_bytes()


def test_files_uploaded_before_a_failure_are_not_sent_again(hub: HubServer, folder: Path) -> None:
    merge("recipe.yaml", "out", max_shard_size="40KB")
    shards = len(list(folder.glob("out/*.safetensors")))
    hub.fault("POST", "/commit/", status=500, times=None)
    assert "fails to answer" in refused("push", "out", REPO)
    sent = len([r for r in hub.requests if r.method == "PUT"])
    assert sent == shards and not any(name.endswith(".safetensors") for name in hub.files(REPO))
    hub.clear_faults()
    push("out", REPO)
    assert len([r for r in hub.requests if r.method == "PUT"]) == sent
    assert answer(run("verify", REPO, "--json"))["good"]


@pytest.mark.parametrize("times", [1, None])
@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "7"}, {"ratelimit": '"api";r=0;t=7', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}],
)
def test_too_many_requests(
    headers: dict[str, str],
    times: int | None,
    hub: HubServer,
    waits: list[float],
) -> None:
    merge("recipe.yaml", "out")
    hub.fault("PUT", ".", status=429, headers=headers, times=times)
    if times is None:
        message = refused("push", "out", REPO)
        assert f"the Hub at {hub.url} limits the rate of requests (429): wait 7 s, then {AGAIN}" in message
        assert "model.safetensors" not in hub.files(REPO)
        hub.clear_faults()
    assert run("push", "out", REPO, "--verify").exit_code == 0
    assert max(waits) == 8.0  # as long as the Hub asks for, and one more


def test_too_many_requests_while_looking(
    hub: HubServer,
) -> None:
    merge("recipe.yaml", "out")
    hub.fault("GET", "/api/", status=429, headers={"Retry-After": "7"}, times=None)
    for command in (("push", "out", REPO), ("plan", "recipe.yaml")):
        assert f"limits the rate of requests (429): wait 7 s, then {AGAIN}" in refused(*command)


def test_a_token_that_is_withdrawn_in_the_middle(
    hub: HubServer,
) -> None:
    merge("recipe.yaml", "out")
    said = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.fault("POST", "/commit/", status=401, headers=said, times=None)
    message = refused("push", "out", REPO)
    assert f"the Hub at {hub.url} refuses the token (Invalid credentials in Authorization header)" in message
    assert "set HF_TOKEN to a valid one, or run `hf auth login`" in message


def test_a_token_that_may_not_write_there(
    hub: HubServer,
) -> None:
    merge("recipe.yaml", "out")
    hub.fault("POST", "/commit/", status=403, headers={"X-Error-Message": "you have no rights"}, times=None)
    message = refused("push", "out", REPO)
    assert "the account of the token may not do this (you have no rights); use a token that may" in message


def test_the_files_on_the_hub_are_compared_with_the_pushed_ones(
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge("recipe.yaml", "out")
    monkeypatch.setattr("mergekit_lfm.output.push._matches", lambda *_: False)
    message = refused("push", "out", REPO)
    assert "on the Hub, " in message and "differ from the pushed files" in message
    assert hub.exists(REPO)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/blob/", marks=pytest.mark.slow),
        pytest.param("PUT", "/lfs/", marks=pytest.mark.slow),
        ("POST", "/commit/"),
    ],
)
def test_a_run_that_is_killed_on_the_way_goes_on(
    method: str, path: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(hub, folder.parent / "client").items():
        monkeypatch.setenv(name, value)
    line = ("merge", "recipe.yaml", "out", "--push-to", REPO, "--verify", "--json")
    process = start(folder, *line)
    if method == "GET":  # the second request for a large file: the first was for a header
        hub.fault("GET", "/blob/", times=2, before=lambda: None)
    hub.fault(method, path, before=process.kill)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    assert (folder / "out").exists() == (method != "GET")
    there = hub.files(REPO).keys() - {".gitattributes"} if hub.exists(REPO) else set()
    assert there == (files_of(folder / "out").keys() if path == "/commit/" else set())  # all of it or nothing
    said = answer(run(*line))
    assert said["already_there"] == (method != "GET") and said["pushed"]["verified"]


def test_ctrl_c_in_an_upload_names_the_complete_folder(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(hub, folder.parent / "client").items():
        monkeypatch.setenv(name, value)
    process = start(folder, "merge", "recipe.yaml", "out", "--push-to", REPO)
    hub.fault("PUT", "/lfs/", before=lambda: process.send_signal(signal.SIGINT))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted: out is complete, but was not pushed; run the same command again to go on" in err
    assert "model.safetensors" not in hub.files(REPO)


@pytest.mark.parametrize(
    ("status", "found"),
    [(401, "refuses the token: set HF_TOKEN to a valid one"), (403, "may not do this; use a token that may")],
)
def test_an_upload_by_xet_that_is_refused(status: int, found: str, request: pytest.FixtureRequest) -> None:
    """The client's native part asks for a token to write with, and has messages of its own."""
    merge("recipe.yaml", "out")
    xet_hub: HubServer = request.getfixturevalue("xet_hub")
    xet_hub.fault("GET", "/xet-write-token/", status=status, times=None)
    message = refused("push", "out", REPO)
    assert found in message
    assert "model.safetensors" not in xet_hub.files(REPO)


# ------------------------------------------------------------------ pulling


def test_a_download_that_is_cut_once_goes_on_by_itself(
    hub: HubServer,
) -> None:
    whole = answer(run("plan", "recipe.yaml", "--json"))["models"][0]["download"]
    hub.fault("GET", "blob|objects|cdn", cut_after=whole // 2, times=1)
    assert run("merge", "recipe.yaml", "out").exit_code == 0
    assert answer(run("verify", "out", "--json"))["good"]


def test_a_download_that_is_cut_for_good(hub: HubServer, folder: Path) -> None:
    run("plan", "recipe.yaml")
    hub.fault("GET", "blob|objects|cdn", cut_after=1000, times=None)
    message = refused("merge", "recipe.yaml", "out")
    assert f"the connection to the Hub at {hub.url} failed for org/" in message and AGAIN in message
    assert list(folder.glob("out*")) == []
    assert [p for p in folder.parent.rglob("*.safetensors") if "snapshots" in p.parts and p.stat().st_size < 5000] == []
    hub.clear_faults()
    assert run("merge", "recipe.yaml", "out").exit_code == 0
    assert answer(run("verify", "out", "--json"))["good"]


def test_a_header_that_is_cut(
    hub: HubServer,
) -> None:
    hub.fault("GET", "blob|objects|cdn", cut_after=10, times=None)
    assert AGAIN in refused("plan", "recipe.yaml")


def test_a_hub_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused("merge", "recipe.yaml", "out")
    assert (
        "org/a is not a local folder, and the connection to the Hub at http://127.0.0.1:9 failed for org/a" in message
    )
    assert "With HF_HUB_OFFLINE=1, models in the cache are read without it" in message


def test_a_wrong_token_is_reported_for_reading_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    message = refused("plan", "recipe.yaml")
    assert "refuses the token" in message and os.environ["HF_TOKEN"] not in message
