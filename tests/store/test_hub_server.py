"""The tests' Hub, judged with the real client: its contents, its refusals, and its failures on request."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_hub import environment, fast_retries
from hub_server import READ_TOKEN, TOKEN, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, but not in its __all__
from models import files_of

REPO = "me/model"
LARGE = bytes(range(256)) * 1200
FILES = {
    "model.safetensors": LARGE,
    "config.json": b'{"a": 1}',
    "README.md": b"# A model\n",
    "with space/notes.txt": b"n" * 150_000,
    "empty.txt": b"",
}
GIT = {".gitattributes": b"*.safetensors filter=lfs\n"}  # of every new repository
HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client's HTTP library: httpx, or its successor


@pytest.fixture(params=["lfs", "xet"])
def server(request: pytest.FixtureRequest) -> HubServer:
    """The Hub, with both ways of storing large files."""
    found: HubServer = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    return found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits between its retries, which take no time."""
    return fast_retries(monkeypatch)


def api(server: HubServer, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=server.url, token=token)


def push(server: HubServer, files: dict[str, bytes], repo: str = REPO, **options: Any) -> str:
    """The commit that the client makes of these files."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return str(api(server).create_commit(repo, operations, commit_message="Push", **options).oid)


def sent(server: HubServer, method: str, path: str) -> list[int]:
    """The status of the answers to such requests; 0 for no answer."""
    return [r.status for r in server.requests if r.method == method and path in r.path]


# ------------------------------------------------------------------ contents


def test_a_repository_is_made_once(hub: HubServer) -> None:
    client = api(hub)
    assert client.create_repo(REPO, private=True).repo_id == REPO
    assert hub.exists(REPO) and hub.private(REPO)
    assert client.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created this model") as refused:
        client.create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert client.create_repo("org/model").repo_id == "org/model" and not hub.private("org/model")


def test_pushed_files_come_back(server: HubServer, tmp_path: Path) -> None:
    parent = server.create(REPO)
    commit = push(server, FILES)
    assert commit == server.head(REPO) == server.revision(REPO, "main")
    assert next((c.sha, c.title, c.parent) for c in server.history(REPO)) == (commit, "Push", parent)
    assert server.files(REPO) == FILES | GIT
    assert files_of(Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))).items() >= FILES.items()
    assert Path(hf_hub_download(REPO, "with space/notes.txt")).read_bytes() == FILES["with space/notes.txt"]
    assert (len(sent(server, "PUT", "/lfs/")) == 0) == server.xet


def test_existing_files_are_not_sent_again(server: HubServer) -> None:
    server.create(REPO)
    first = push(server, FILES)
    uploads = len(sent(server, "PUT", "/lfs/"))
    assert push(server, FILES) == first  # the client does not make an empty commit
    assert len(sent(server, "PUT", "/lfs/")) == uploads and len(server.history(REPO)) == 2


def test_a_folder_is_pushed_in_one_commit(server: HubServer, tmp_path: Path) -> None:
    server.create(REPO)
    for path, data in FILES.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    api(server).upload_folder(repo_id=REPO, folder_path=tmp_path / "folder")
    assert server.files(REPO) == FILES | GIT and len(server.history(REPO)) == 2


def test_large_files_go_in_parts(hub: HubServer) -> None:
    hub.multipart_over, hub.part_size = 200_000, 100_000
    hub.create(REPO)
    push(hub, FILES)
    assert len(sent(hub, "PUT", "/lfs/")) == 4 + 1 and sent(hub, "POST", "/complete") == [200]
    assert hub.files(REPO) == FILES | GIT


def test_files_are_listed_in_pages_with_their_kinds(server: HubServer) -> None:
    server.create(REPO)
    server.page = 2
    push(server, FILES)
    found = {entry.path: entry for entry in api(server).list_repo_tree(REPO, recursive=True)}
    files = {path: entry for path, entry in found.items() if isinstance(entry, RepoFile)}
    assert found.keys() - files.keys() == {"with space"} and files.keys() == (FILES | GIT).keys()
    assert {path: entry.size for path, entry in files.items()} == {p: len(d) for p, d in (FILES | GIT).items()}
    assert sent(server, "GET", "/tree/") == [200] * 4
    config, model = files["config.json"], files["model.safetensors"]
    assert config.lfs is None and config.blob_id == hashlib.sha1(b"blob 8\0" + FILES["config.json"]).hexdigest()
    assert model.lfs is not None and model.lfs.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert model.blob_id != model.lfs.sha256 and (model.xet_hash is not None) == server.xet


def test_a_folder_is_listed_alone(hub: HubServer) -> None:
    hub.create(REPO, FILES)
    top = {entry.path: type(entry) for entry in api(hub).list_repo_tree(REPO)}
    assert top["with space"] is RepoFolder and "with space/notes.txt" not in top
    assert [entry.path for entry in api(hub).list_repo_tree(REPO, "with space")] == ["with space/notes.txt"]


def test_branches_tags_and_commits_are_found(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.create(REPO, {"a.txt": b"1"})
    hub.tag(REPO, "v1", first)
    second = hub.commit(REPO, {"a.txt": b"2"})
    found = {name: api(hub).model_info(REPO, revision=name).sha for name in ("main", "v1", first, second)}
    assert found == {"main": second, "v1": first, first: first, second: second}
    assert api(hub).resolve_revision(REPO, revision="v1").resolved == first
    assert hub.files(REPO, "v1")["a.txt"] == b"1" and hub.files(REPO)["a.txt"] == b"2"
    snapshot_download(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert api(hub).resolve_revision(REPO).resolved == second
    assert files_of(Path(snapshot_download(REPO)))["a.txt"] == b"2" and len(hub.requests) == asked


def test_offline_a_part_of_a_model_is_not_taken_for_all_of_it(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(REPO, FILES)
    snapshot_download(REPO, allow_patterns=["*.json"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert files_of(Path(snapshot_download(REPO, allow_patterns=["*.json"]))) == {"config.json": FILES["config.json"]}
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "model.safetensors")


def test_files_and_folders_are_deleted_in_a_commit(server: HubServer) -> None:
    server.create(REPO)
    push(server, FILES)
    gone = [CommitOperationDelete("with space/", is_folder=True), CommitOperationDelete("config.json")]
    new = CommitOperationAdd("new.bin", LARGE)
    api(server).create_commit(REPO, [*gone, new], commit_message="Tidy")
    assert server.files(REPO).keys() == (FILES | GIT).keys() - {"with space/notes.txt", "config.json"} | {"new.bin"}
    head = server.head(REPO)
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api(server).create_commit(REPO, [CommitOperationDelete("nowhere.txt")], commit_message="Tidy")
    assert server.head(REPO) == head


def test_parts_of_files_are_sent(hub: HubServer) -> None:
    hub.create(REPO, FILES)
    for name in ("model.safetensors", "config.json"):
        url, data = f"{hub.url}/{REPO}/resolve/main/{name}", FILES[name]
        for wanted, expected in (("2-4", data[2:5]), ("3-", data[3:]), ("0-9999999", data)):
            answer = get_session().get(url, headers={"Range": f"bytes={wanted}"})
            assert (answer.status_code, answer.content) == (206, expected)
            assert answer.headers["Content-Range"].endswith(f"/{len(data)}")
        assert get_session().get(url, headers={"Range": "bytes=9999999-"}).status_code == 416


def test_two_uploads_at_once(hub: HubServer) -> None:
    hub.create(REPO)
    contents = [{f"{n}.safetensors": bytes([n]) * 300_000, "same.safetensors": LARGE} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        commits = list(pool.map(lambda files: push(hub, files), contents))
    assert len(set(commits)) == 4 and hub.head(REPO) in commits
    assert hub.files(REPO) == {k: v for files in contents for k, v in files.items()} | GIT


def test_a_process_of_its_own_is_led_there(server: HubServer, tmp_path: Path) -> None:
    server.create(REPO, FILES, private=True)
    program = f"import huggingface_hub; print(huggingface_hub.snapshot_download({REPO!r}))"
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(server, home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(home) and files_of(Path(done.stdout.strip())) == FILES | GIT


# ------------------------------------------------------------------ refusals


def test_a_commit_onto_another_than_the_newest_is_refused(server: HubServer) -> None:
    parent = server.create(REPO)
    theirs = server.commit(REPO, {"theirs.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        push(server, FILES, parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert server.head(REPO) == theirs
    assert server.revision(REPO, push(server, FILES, parent_commit=theirs)) == server.head(REPO)


def test_somebody_commits_during_an_upload(server: HubServer) -> None:
    parent = server.create(REPO)
    server.fault("POST", "/preupload/", before=lambda: server.commit(REPO, {"theirs.txt": b"1"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push(server, FILES, parent_commit=parent)
    assert server.files(REPO).keys() == {"theirs.txt", *GIT}
    push(server, FILES)
    assert server.files(REPO) == {"theirs.txt": b"1"} | FILES | GIT


def test_private_repositories_are_invisible_without_a_token(hub: HubServer) -> None:
    hub.create(REPO, FILES, private=True)
    hub.create("other/open", FILES)
    assert api(hub, READ_TOKEN).model_info(REPO).private
    assert api(hub, False).model_info("other/open").private is False
    for name in (REPO, "me/nowhere"):
        with pytest.raises(RepositoryNotFoundError, match="401 Client Error"):
            api(hub, False).model_info(name)
        with pytest.raises(RepositoryNotFoundError, match="401 Client Error"):
            hf_hub_download(name, "config.json", token=False)
    with pytest.raises(RepositoryNotFoundError, match="404 Client Error"):
        api(hub).model_info("me/nowhere")


def test_a_wrong_token_is_refused_everywhere(hub: HubServer, tmp_path: Path) -> None:
    hub.create(REPO, FILES)
    wrong = "hf_" + "w" * 34
    client = api(hub, wrong)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client.whoami()
    for ask in (
        lambda: client.model_info(REPO),
        lambda: list(client.list_repo_tree(REPO)),
        lambda: client.create_repo("me/new"),
        lambda: client.create_commit(REPO, [CommitOperationAdd("a", b"")], commit_message="m"),
        lambda: hf_hub_download(REPO, "config.json", token=wrong, local_dir=tmp_path / "copy"),
    ):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as refused:
            ask()
        assert refused.value.response.status_code == 401
        assert not isinstance(refused.value, RepositoryNotFoundError)


def test_writes_without_permission_are_refused(hub: HubServer) -> None:
    hub.create("other/model")
    account = api(hub).whoami()
    assert (account["name"], [org["name"] for org in account["orgs"]]) == ("me", ["org"])
    assert account["auth"]["accessToken"]["role"] == "write"
    assert api(hub, READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"
    for token, name in ((READ_TOKEN, "me/new"), (TOKEN, "other/new")):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights to create a model"):
            api(hub, token).create_repo(name)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        push(hub, FILES, "other/model")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        api(hub, False).create_repo("me/new")
    assert not hub.exists("me/new") and len(hub.history("other/model")) == 1


def test_gated_files_are_not_for_everybody(hub: HubServer) -> None:
    hub.create(REPO, FILES)
    hub.gate(REPO)
    assert api(hub).model_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError, match="is restricted and you are not in the list"):
        hf_hub_download(REPO, "config.json")
    with pytest.raises(GatedRepoError):
        snapshot_download(REPO)


def test_missing_revisions_and_files_are_distinguished(hub: HubServer) -> None:
    hub.create(REPO, FILES)
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(REPO, revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        list(api(hub).list_repo_tree(REPO, revision="nowhere"))
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nowhere.json")


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("base_model: org/a", None),
        ("base_model: [gpt2, org/a-1.5_b]", None),
        ("base_model: [org/a, /home/x/y]", '"base_model" with value "/home/x/y" is not valid'),
        ("- a", "the metadata is not a mapping"),
    ],
)
def test_a_card_is_judged_before_anything_is_sent(front: str, problem: str | None, hub: HubServer) -> None:
    hub.create(REPO)
    card = {"README.md": f"---\n{front}\n---\n# A model\n".encode(), "model.safetensors": LARGE}
    if problem is None:
        push(hub, card)
        return
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md") as refused:
        push(hub, card)
    assert problem in str(refused.value) and len(hub.history(REPO)) == 1 and not sent(hub, "PUT", "/lfs/")


def test_contents_are_compared_with_their_names(hub: HubServer) -> None:
    hub.create(REPO)
    name, headers = hashlib.sha256(LARGE).hexdigest(), {"Authorization": f"Bearer {TOKEN}"}
    assert get_session().put(f"{hub.url}/lfs/{name}", content=LARGE[1:]).status_code == 422
    body = '{"key": "header", "value": {"summary": "s"}}\n{"key": "lfsFile", "value": {"path": "a", "oid": "%s"}}'
    answer = get_session().post(f"{hub.url}/api/models/{REPO}/commit/main", content=body % name, headers=headers)
    assert answer.status_code == 400 and "never uploaded" in answer.json()["error"]
    assert len(hub.history(REPO)) == 1


def test_the_token_goes_to_no_other_host(server: HubServer) -> None:
    server.create(REPO, FILES, private=True)
    push(server, {"more.safetensors": LARGE[5:]})
    snapshot_download(REPO)
    tokens = {host: {r.token for r in server.requests if r.host == host} for host in ("127.0.0.1", "localhost")}
    assert TOKEN in tokens["127.0.0.1"] and tokens["localhost"] == {None}


# ------------------------------------------------------------------ failures


LIMITED = [
    {"Retry-After": "7"},
    {"ratelimit": '"api";r=0;t=7', "ratelimit-policy": '"fixed window";"api";q=500;w=300'},
]


@pytest.mark.parametrize("headers", LIMITED, ids=["retry-after", "ratelimit"])
def test_the_client_waits_as_long_as_the_hub_asks(headers: dict[str, str], hub: HubServer, waits: list[float]) -> None:
    hub.create(REPO)
    for path in ("/preupload/", "/objects/batch", "/lfs/verify"):
        hub.fault("POST", path, status=429, headers=headers)
    hub.fault("PUT", "/lfs/", status=429, headers=headers)
    push(hub, {"model.safetensors": LARGE})
    hub.fault("GET", "/tree/", status=429, headers=headers)
    hub.fault("GET", "/blob/", status=429, headers=headers)
    snapshot_download(REPO)
    assert waits == [8.0] * 6 and [r.status for r in hub.requests].count(429) == 6
    assert hub.files(REPO) == {"model.safetensors": LARGE} | GIT


def test_requests_that_the_client_does_not_repeat(hub: HubServer, waits: list[float]) -> None:
    hub.create(REPO, FILES)
    hub.fault("GET", "/api/models|whoami", status=429, headers=LIMITED[0], times=None)
    hub.fault("POST", "/commit/|create|yaml", status=429, headers=LIMITED[0], times=None)
    hub.fault("GET", "/blob/", status=503, times=None)
    for ask in (
        lambda: api(hub).whoami(),
        lambda: api(hub).model_info(REPO),
        lambda: api(hub).resolve_revision(REPO),
        lambda: api(hub).create_repo("me/new"),
        lambda: push(hub, {"README.md": b"new"}),
        lambda: push(hub, {"a.txt": b"new"}),
        lambda: hf_hub_download(REPO, "model.safetensors"),
    ):
        before = len(hub.requests)
        with pytest.raises(HfHubHTTPError):
            ask()
        assert len([r for r in hub.requests[before:] if r.status in (429, 503)]) == 1
    assert waits == []


def test_where_it_gives_up(hub: HubServer, waits: list[float]) -> None:
    hub.create(REPO)
    hub.fault("PUT", "/lfs/", status=500, times=None)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors' to the Hub") as failed:
        push(hub, {"model.safetensors": LARGE})
    assert isinstance(failed.value.__cause__, HfHubHTTPError)
    assert sent(hub, "PUT", "/lfs/") == [500] * 6 and waits == [1, 2, 4, 8, 8]
    hub.clear_faults()
    push(hub, {"model.safetensors": LARGE})


@pytest.mark.parametrize("cut_after", [0, 1000, len(LARGE) - 1])
def test_an_upload_that_is_cut_is_sent_again(cut_after: int, hub: HubServer, waits: list[float]) -> None:
    hub.create(REPO)
    hub.fault("PUT", "/lfs/", cut_after=cut_after, times=2)
    push(hub, {"model.safetensors": LARGE})
    puts = [r for r in hub.requests if r.method == "PUT"]
    assert [r.body_bytes for r in puts] == [cut_after, cut_after, len(LARGE)]
    assert [r.status for r in puts] == [0, 0, 200] and waits == [1, 2]
    assert hub.files(REPO)["model.safetensors"] == LARGE


def test_a_download_that_is_cut_goes_on(hub: HubServer, waits: list[float]) -> None:
    hub.create(REPO, FILES)
    hub.fault("GET", "/blob/", cut_after=100_000, times=2)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == LARGE
    assert len(sent(hub, "GET", "/blob/")) == 3 and waits == [1, 1]
    hub.fault("GET", "/blob/", cut_after=100_000, times=None)
    with pytest.raises(HTTPError, match="peer closed connection without sending complete message body"):
        hf_hub_download(REPO, "model.safetensors", force_download=True)
    assert len(sent(hub, "GET", "/blob/")) == 3 + 6


def test_a_commit_that_is_cut_is_not_sent_again(server: HubServer, waits: list[float]) -> None:
    server.create(REPO)
    server.fault("POST", "/commit/", cut_after=10)
    with pytest.raises(HTTPError, match="Server disconnected without sending a response"):
        push(server, FILES)
    assert sent(server, "POST", "/commit/") == [0] and waits == [] and len(server.history(REPO)) == 1
    push(server, FILES)
    assert server.files(REPO) == FILES | GIT


def test_a_revision_that_cannot_be_asked_for(hub: HubServer) -> None:
    hub.create(REPO, FILES)
    hub.fault("GET", "/api/models/", status=500, times=None)
    with pytest.raises(RevisionResolutionError, match="the Hub could not be reached"):
        api(hub).resolve_revision(REPO)
    with pytest.raises(LocalEntryNotFoundError, match="An error happened while trying to locate") as failed:
        snapshot_download(REPO)
    assert isinstance(failed.value.__cause__, HfHubHTTPError)


def test_faults_are_for_the_calls_they_name_and_in_order(hub: HubServer) -> None:
    hub.create(REPO)
    hub.fault("GET", "whoami", status=501)
    hub.fault("GET", "whoami", status=502, times=2)
    hub.fault("POST", "whoami", status=503, times=None)
    asked = [
        get_session().get(f"{hub.url}/api/whoami-v2", headers={"Authorization": f"Bearer {TOKEN}"}) for _ in "1234"
    ]
    assert [answer.status_code for answer in asked] == [501, 502, 502, 200]
    hub.fault("GET", "whoami", status=500, times=None)
    hub.clear_faults()
    assert api(hub).whoami()["name"] == "me"
