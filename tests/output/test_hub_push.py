"""Models pushed to the Hub: files that go there, files that stay there, and refusals before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_commands import answer, refusal, run
from helpers_faults import llama_tensors, save_model
from helpers_hub import RECIPE, REPO, prepare
from hub_server import READ_TOKEN, TOKEN, HubServer
from models import files_of

from mergekit_lfm import merge, push
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.secrets import PART
from mergekit_lfm.output.card import front_matter


@pytest.fixture(params=["lfs", "xet"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with both ways of storing large files; the working directory has the recipe."""
    found: HubServer = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    place = tmp_path / "here"
    place.mkdir()
    prepare(found, place)
    monkeypatch.chdir(place)
    return found


@pytest.fixture
def folder(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a merge of both models in `out`."""
    place = tmp_path / "here"
    place.mkdir()
    prepare(hub, place)
    monkeypatch.chdir(place)
    merge("recipe.yaml", "out")
    return place


def writes(server: HubServer) -> list[str]:
    """The requests that change the Hub."""
    reading = ("/api/validate-yaml", "/preupload/")
    return [
        f"{r.method} {r.path}"
        for r in server.requests
        if r.method in ("POST", "PUT", "DELETE") and not any(part in r.path for part in reading)
    ]


# ------------------------------------------------------------------ the whole way


def test_two_models_on_the_hub_are_merged_pushed_pulled_and_verified_in_one_command(server: HubServer) -> None:
    result = run("merge", "recipe.yaml", "out", "--push-to", REPO, "--private", "--verify")
    assert (result.exit_code, result.stdout) == (0, f"out\n{server.url}/{REPO}\n")
    head = server.head(REPO)
    assert f"to {server.url}/{REPO} at commit {head}\n" in result.stderr
    assert server.private(REPO)
    there = server.files(REPO)
    there.pop(".gitattributes", None)
    assert there == files_of(Path("out"))
    assert server.history(REPO)[0].title == "Merge by linear, with mergekit_lfm 0.1.0"
    assert len([line for line in writes(server) if "/commit/" in line]) == 1
    assert TOKEN not in result.output and TOKEN not in "".join(map(repr, files_of(Path("out")).values()))
    again = answer(run("verify", REPO, "--json"))
    assert "files there that the lock does not name" in again.pop("not_covered")
    assert (again["out"], again["good"], again["problems"]) == (REPO, True, [])


def test_the_card_names_the_models_and_no_local_path(server: HubServer, tmp_path: Path) -> None:
    run("merge", "recipe.yaml", "out", "--push-to", REPO)
    card = tmp_path / "card.md"
    card.write_bytes(server.files(REPO)["README.md"])
    assert front_matter(card) == {
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergekit_lfm"],
    }
    assert str(tmp_path).encode() not in b"".join(server.files(REPO).values())


@pytest.mark.usefixtures("server")
def test_a_pushed_model_can_be_merged_again() -> None:
    merge("recipe.yaml", "out", push_to=REPO)
    merge({"merge_method": "passthrough", "models": [{"model": REPO}]}, "copy")
    assert files_of(Path("copy"))["model.safetensors"] == files_of(Path("out"))["model.safetensors"]


def test_the_same_again_changes_nothing(server: HubServer) -> None:
    first = answer(run("merge", "recipe.yaml", "out", "--push-to", REPO, "--json"))["pushed"]
    assert set(first["files"]) == set(files_of(Path("out"))) and first["commit"] == server.head(REPO)
    before = len(writes(server))
    second = answer(run("merge", "recipe.yaml", "out", "--push-to", REPO, "--json"))["pushed"]
    assert (second["files"], second["removed"], second["bytes"]) == ([], [], 0)
    assert second["commit"] == first["commit"] == server.head(REPO)
    assert len(writes(server)) == before
    assert "already there: " in run("push", "out", REPO).stderr


def test_another_merge_replaces_it_and_leaves_no_file_of_the_first(server: HubServer) -> None:
    merge("recipe.yaml", "out", max_shard_size="40KB", push_to=REPO)
    assert len([name for name in server.files(REPO) if name.endswith(".safetensors")]) > 2
    server.commit(REPO, {"figure.png": b"of somebody"})
    Path("recipe.yaml").write_text(RECIPE.replace("weight: 1", "weight: [0.2, 0.8]"))
    said = answer(run("merge", "recipe.yaml", "two", "--push-to", REPO, "--json"))["pushed"]
    assert "model.safetensors.index.json" in said["removed"]
    there = server.files(REPO)
    there.pop(".gitattributes", None)
    assert there.pop("figure.png") == b"of somebody"
    assert there == files_of(Path("two"))


def test_a_recipe_says_where_its_result_goes(server: HubServer) -> None:
    Path("recipe.yaml").write_text(RECIPE + f"push: {{repo: {REPO}, private: true}}\n")
    planned = answer(run("plan", "recipe.yaml", "out", "--json"))
    assert planned["push"] == {"repo": REPO, "private": True} and not server.exists(REPO)
    assert f"to {REPO}, private" in run("merge", "recipe.yaml", "--dry-run").stdout
    merge("recipe.yaml", "out")
    assert server.exists(REPO) and server.private(REPO)
    Path("recipe.yaml").write_text(RECIPE + "push: me/short\n")
    run("merge", "recipe.yaml", "out2")
    assert server.exists("me/short") and not server.private("me/short")
    lock = json.loads(Path("out/merge.lock.json").read_text())
    assert "push" not in json.dumps({**lock, "recipe_text": ""}).replace("pushing", "")


def test_large_files_go_in_parts_and_long_lists_in_pages(hub: HubServer, folder: Path) -> None:
    hub.multipart_over, hub.part_size, hub.page = 50_000, 30_000, 2
    result = run("merge", "recipe.yaml", "two", "--push-to", REPO, "--verify", "--max-shard-size", "60KB")
    assert result.exit_code == 0, result.stderr
    assert len([r for r in hub.requests if r.method == "PUT" and r.path.count("/") == 3]) >= 2
    there = hub.files(REPO)
    there.pop(".gitattributes")
    assert there == files_of(folder / "two")


def test_the_token_goes_to_no_other_host(hub: HubServer, folder: Path) -> None:
    assert run("merge", "recipe.yaml", "two", "--push-to", REPO, "--verify").exit_code == 0
    hosts = {r.host: {q.token for q in hub.requests if q.host == r.host} for r in hub.requests}
    assert hosts.keys() == {"127.0.0.1", "localhost"} and hosts["localhost"] == {None}
    assert (folder / "two").is_dir()


# ------------------------------------------------------------------ existing repositories


def test_a_card_that_was_edited_on_the_hub_is_kept(hub: HubServer, folder: Path) -> None:
    push("out", REPO)
    edited = b"---\nlicense: mit\n---\n\n# My merge\n"
    hub.commit(REPO, {"README.md": edited})
    (folder / "recipe.yaml").write_text(RECIPE.replace("weight: 1", "weight: [0.2, 0.8]"))
    result = run("merge", "recipe.yaml", "two", "--push-to", REPO, "--verify")
    assert result.exit_code == 0
    assert (
        "the model card was edited on the Hub and is kept (--replace-card replaces it); this merge's card is"
        in result.stderr
    )
    there = hub.files(REPO)
    assert there["README.md"] == edited
    ours = (folder / "two/README.md").read_text()
    assert there["MERGE.md"].decode() == ours[ours.index("# two") :]
    assert there["model.safetensors"] == (folder / "two/model.safetensors").read_bytes()
    assert run("push", "two", REPO, "--replace-card").exit_code == 0
    assert hub.files(REPO)["README.md"] == (folder / "two/README.md").read_bytes()


def test_a_card_of_an_earlier_push_is_replaced(hub: HubServer, folder: Path) -> None:
    push("out", REPO)
    (folder / "recipe.yaml").write_text(RECIPE.replace("weight: 1", "weight: [0.2, 0.8]"))
    merge("recipe.yaml", "two", push_to=REPO)
    assert hub.files(REPO)["README.md"] == (folder / "two/README.md").read_bytes()
    assert "MERGE.md" not in hub.files(REPO)


@pytest.mark.usefixtures("folder")
def test_a_card_that_was_there_before_is_kept(
    hub: HubServer,
) -> None:
    hub.create(REPO, {"README.md": b"# Planned\n"})
    assert push("out", REPO).result.kept_card
    assert hub.files(REPO)["README.md"] == b"# Planned\n" and "MERGE.md" in hub.files(REPO)


def test_weights_of_somebody_else_are_not_replaced_unasked(hub: HubServer, folder: Path) -> None:
    hub.create(REPO, {"pytorch_model.bin": b"precious", "notes.txt": b"mine"})
    head = hub.head(REPO)
    message = refusal(run("merge", "recipe.yaml", "two", "--push-to", REPO))
    assert f"{REPO} holds pytorch_model.bin, which is not from an earlier push of a merge" in message
    assert hub.head(REPO) == head and not (folder / "two").exists()
    pushed = push("out", REPO, overwrite=True).result
    assert pushed.removed == ("pytorch_model.bin",)
    assert hub.files(REPO)["notes.txt"] == b"mine" and "pytorch_model.bin" not in hub.files(REPO)


@pytest.mark.parametrize("theirs", ["adapter_model.safetensors", "config.json", "model-q4.gguf", "unet/weights.bin"])
@pytest.mark.usefixtures("folder")
def test_a_repository_of_another_kind_is_not_written_over(theirs: str, hub: HubServer) -> None:
    hub.create(REPO, {theirs: b"{}"})
    assert f"{REPO} holds {theirs}, which is not from an earlier push" in refusal(run("push", "out", REPO))


def test_weights_of_the_user_beside_a_push_stay(hub: HubServer, folder: Path) -> None:
    push("out", REPO)
    hub.commit(REPO, {"model-int8.safetensors": b"mine", "gguf/model.gguf": b"mine"})
    (folder / "recipe.yaml").write_text(RECIPE.replace("weight: 1", "weight: [0.2, 0.8]"))
    merge("recipe.yaml", "two", push_to=REPO)
    assert hub.files(REPO)["model-int8.safetensors"] == b"mine" and "gguf/model.gguf" in hub.files(REPO)


@pytest.mark.usefixtures("folder")
def test_a_repository_that_appears_meanwhile_is_checked(hub: HubServer) -> None:
    """Somebody creates the repository, public and with weights, after it was found missing and before it is made."""
    hub.fault("POST", "/api/repos/create", before=lambda: hub.create(REPO, {"model.safetensors": b"theirs"}))
    assert "you asked for a private repository" in refusal(run("push", "out", REPO, "--private"))
    assert hub.files(REPO)["model.safetensors"] == b"theirs"


@pytest.mark.usefixtures("folder")
def test_pulling_back_downloads_even_with_a_full_cache(hub: HubServer) -> None:
    push("out", REPO)
    assert run("verify", REPO).exit_code == 0  # now it is in the cache
    before = len(hub.requests)
    assert push("out", REPO, pull_back=True).result.verified
    assert any(r.path.startswith("/blob/") for r in hub.requests[before:] if r.method == "GET")
    tree = hub.history(REPO)[0].tree
    blob = hub.store.blobs / tree["model.safetensors"].sha256
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    message = refusal(run("push", "out", REPO, "--verify"))
    assert f"{REPO}@{hub.head(REPO)} was pushed, but downloaded again it differs from its lock" in message


def test_a_folder_that_differs_from_its_lock_is_not_pushed_to_be_verified(hub: HubServer, folder: Path) -> None:
    with (folder / "out/README.md").open("a") as card:
        card.write("My words.\n")
    message = refusal(run("push", "out", REPO, "--verify"))
    assert "out differs from its lock" in message and "README.md was changed" in message
    assert not hub.exists(REPO)
    push("out", REPO)
    assert hub.files(REPO)["README.md"].endswith(b"My words.\n")


def test_files_beside_the_output_are_pushed_with_it_and_no_difference(hub: HubServer, folder: Path) -> None:
    (folder / "out" / "figure.md").write_text("Mine.\n")
    assert push("out", REPO, pull_back=True).result.verified
    assert hub.files(REPO)["figure.md"] == b"Mine.\n"
    assert answer(run("verify", REPO, "--json"))["good"]


def test_a_kept_card_is_not_a_difference_to_the_lock(hub: HubServer, folder: Path) -> None:
    push("out", REPO)
    hub.commit(REPO, {"README.md": b"# Mine\n"})
    (folder / "recipe.yaml").write_text(RECIPE.replace("weight: 1", "weight: [0.2, 0.8]"))
    merge("recipe.yaml", "two", push_to=REPO)
    assert answer(run("verify", REPO, "--json"))["good"]
    push("two", REPO, replace_card=True)
    assert "MERGE.md" not in hub.files(REPO)


@pytest.mark.parametrize("lock", [b'{"files": []}', b'{"files": null}', b"[]", b"{"])
@pytest.mark.usefixtures("folder")
def test_a_damaged_lock_on_the_hub(lock: bytes, hub: HubServer) -> None:
    hub.create(REPO, {"merge.lock.json": lock, "README.md": b"# X\n"})
    assert push("out", REPO).result.kept_card


def test_private_is_not_made_public(hub: HubServer, folder: Path) -> None:
    hub.create(REPO, {})
    message = refusal(run("merge", "recipe.yaml", "two", "--push-to", REPO, "--private"))
    assert f"{REPO} exists and is public, but you asked for a private repository" in message
    assert not (folder / "two").exists()


# ------------------------------------------------------------------ refusals before anything is sent


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("merged", TOKEN, "found 'merged'"),
        ("me/merged@main", TOKEN, "expected a repository on the Hub as org/name"),
        ("other/merged", TOKEN, "the token is of me, who may push to me, org, but not to other"),
        (REPO, None, "found no token to push with: set HF_TOKEN, or run `hf auth login`"),
        (REPO, READ_TOKEN, "the token may only read: push with one of the role `write`"),
        (REPO, "hf_" + "x" * 34, "refuses the token (Invalid"),
    ],
)
@pytest.mark.parametrize("command", ["push", "merge"])
@pytest.mark.usefixtures("hub")
def test_a_push_without_permission_is_refused_before_the_merge(
    command: str,
    repo: str,
    token: str | None,
    message: str,
    hub: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    before = list(writes(hub))
    if command == "push":
        said = refusal(run("push", "out", repo))
    elif token is not None and token.startswith("hf_x"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        said = refusal(run("merge", "recipe.yaml", "two", "--push-to", repo))
    else:
        said = refusal(run("merge", "recipe.yaml", "two", "--push-to", repo))
    assert message in said
    assert token is None or token not in said
    assert writes(hub) == before and not (folder / "two").exists()


@pytest.mark.usefixtures("folder")
def test_offline_nothing_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be pushed to while HF_HUB_OFFLINE is set" in refusal(run("push", "out", REPO))


@pytest.mark.usefixtures("hub")
def test_only_whole_models_are_pushed(hub: HubServer, folder: Path) -> None:
    weights = folder / "out/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(FormatError, match="unfinished output of an interrupted run"):
        push("out", REPO)
    weights.write_bytes(whole)
    (folder / "out/merge.replaced").mkdir()
    with pytest.raises(PlanError, match="still holds the files it replaced"):
        push("out", REPO)
    (folder / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no model"):
        push("empty", REPO)
    with pytest.raises(PlanError, match="is not a folder"):
        push("nowhere", REPO)
    assert not hub.exists(REPO)


@pytest.mark.usefixtures("folder")
def test_private_and_verify_need_a_push() -> None:
    for option in ("--private", "--verify"):
        result = run("merge", "recipe.yaml", "two", option)
        assert result.exit_code == 2 and "give --push-to org/name" in result.stderr


def test_tokens_and_paths_do_not_go_out(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home/somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (folder / "out/notes.md").write_text(f"trained with\nHF_TOKEN={TOKEN}\n")
    (folder / "out/extra.json").write_text(json.dumps({"data": f"{home}/data.jsonl"}))
    message = refusal(run("push", "out", REPO))
    assert "2 problems" in message
    assert "extra.json, line 1: a path of this machine" in message
    assert "notes.md, line 2: a token of the Hub" in message
    assert TOKEN not in message and not hub.exists(REPO)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("run.sh", f"export HF_TOKEN={TOKEN}", "a token of the Hub"),
        ("training_args.bin", f"\0{TOKEN}\0", "a token of the Hub"),
        ("a.txt", "hf_oauth_" + "x" * 40, "a token of the Hub"),
        ("config.json", '{"text_config": {"_name_or_path": "/data/a"}}', "a path of this machine"),
        ("notes.md", "/home/client/data", "a path of this machine"),
    ],
)
def test_secrets_in_other_files_are_seen(
    name: str, text: str, found: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home")
    (folder / "out" / name).write_text(text)
    assert f"{name}, line 1: {found}" in refusal(run("push", "out", REPO))
    assert not hub.exists(REPO)


def test_a_secret_deep_in_a_large_file_is_seen(hub: HubServer, folder: Path) -> None:
    data = b"\n" * (PART - 10) + b"AKIA" + b"G7" * 8 + b"\n"  # on the border of the parts that are read
    (folder / "out/optimizer.pt").write_bytes(data)
    assert f"optimizer.pt, line {PART - 9}: a key of AWS" in refusal(run("push", "out", REPO))
    assert not hub.exists(REPO)


def test_a_secret_in_a_name_or_in_the_message_is_seen(hub: HubServer, folder: Path) -> None:
    assert "the commit's message holds a token or a key" in refusal(run("push", "out", REPO, "-m", f"with {TOKEN}"))
    (folder / f"out/{TOKEN}.txt").touch()
    message = refusal(run("push", "out", REPO))
    assert "the name of [a token of the Hub].txt is a token or a key" in message and TOKEN not in message
    assert not hub.exists(REPO)


def test_links_out_of_the_folder_stay_here_but_for_weights(hub: HubServer, folder: Path) -> None:
    (folder / "private.txt").write_text("mine")
    (folder / "out/notes.txt").symlink_to(folder / "private.txt")
    (folder / "out/again.json").symlink_to("config.json")
    weights = folder / "out/model.safetensors"
    content = weights.read_bytes()
    weights.rename(folder / "kept.safetensors")
    weights.symlink_to(folder / "kept.safetensors")
    result = run("push", "out", REPO)
    assert "not pushed, as they are hidden or links out of the folder: notes.txt" in result.stderr
    there = hub.files(REPO)
    assert "notes.txt" not in there and there["again.json"] == there["config.json"]
    assert there["model.safetensors"] == content


@pytest.mark.parametrize("token", ["\u201chf_x\u201d", "hf_x y"])
@pytest.mark.usefixtures("folder")
def test_a_token_that_can_be_none_is_said_to_be(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    message = refusal(run("push", "out", REPO))
    assert "the token of the Hub has characters that no token has" in message and token not in message


@pytest.mark.usefixtures("folder")
def test_configs_lose_the_folder_that_transformers_noted(
    hub: HubServer,
) -> None:
    for name in ("a", "b"):
        config = {**json.loads(hub.files(f"org/{name}")["config.json"]), "_name_or_path": "/srv/secret/model"}
        tokenizer = {"name_or_path": "/srv/secret/model", "model_max_length": 64}
        hub.commit(
            f"org/{name}",
            {
                "config.json": json.dumps({**config, "text_config": {"_name_or_path": "/srv/secret/x"}}).encode(),
                "tokenizer_config.json": json.dumps(tokenizer).encode(),
            },
        )
    merge("recipe.yaml", "two", push_to=REPO)
    assert b"/srv/secret" not in b"".join(hub.files(REPO).values())
    assert json.loads(hub.files(REPO)["tokenizer_config.json"]) == {"model_max_length": 64}


def test_hidden_files_stay_here_and_are_named(hub: HubServer, folder: Path) -> None:
    (folder / "out/.cache").mkdir()
    (folder / "out/.cache/x").write_text("x")
    (folder / "out/LICENSE").write_text("free")
    result = run("push", "out", REPO, "-m", "A message of mine")
    assert "not pushed, as they are hidden or links out of the folder: .cache/x" in result.stderr
    assert "LICENSE" in hub.files(REPO) and ".cache/x" not in hub.files(REPO)
    assert hub.history(REPO)[0].title == "A message of mine"


def test_a_card_that_the_hub_does_not_accept_is_said_before_the_upload(hub: HubServer, folder: Path) -> None:
    (folder / "out/README.md").write_text("---\nbase_model: ./models/a\n---\n# X\n")
    message = refusal(run("push", "out", REPO))
    assert "Invalid metadata in README.md" in message and "base_model" in message
    assert not any(r.method == "PUT" for r in hub.requests) and "model.safetensors" not in hub.files(REPO)


def test_a_model_that_is_not_a_merge_is_pushed_as_it_is(hub: HubServer, folder: Path) -> None:
    message = refusal(run("verify", "org/a"))
    assert f"org/a@{hub.head('org/a')} has no merge.lock.json: it is not an output of `merge`" in message
    save_model(folder / "plain", llama_tensors(3))
    assert answer(run("push", "plain", "me/plain", "--json"))["repo"] == "me/plain"
    there = hub.files("me/plain")
    there.pop(".gitattributes", None)
    assert there == files_of(folder / "plain")
    assert "has no merge.lock.json to compare with" in refusal(run("push", "plain", "me/plain2", "--verify"))
    assert not hub.exists("me/plain2")
