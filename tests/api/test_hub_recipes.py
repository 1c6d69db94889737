"""Recipes with models on the Hub: the same bytes as with local copies, at a commit, downloading only needed files.

The client is the real one, the Hub a server of this machine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers_commands import ROOT, answer, refusal, run
from helpers_faults import llama_tensors, near, save_model
from hub_server import TOKEN, HubServer
from models import files_of, output_of
from safetensors.torch import save_file

from mergekit_lfm import merge, open_checkpoint, plan_merge
from mergekit_lfm.api.arguments import model_folder
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.views.adapted import open_model

RECIPE = """\
merge_method: linear
models:
  - model: org/a
    parameters: {weight: 1}
  - model: org/b@v1
    parameters: {weight: 3}
"""
pytestmark = [pytest.mark.usefixtures("models"), pytest.mark.filterwarnings("ignore:.* left behind. .*other weights")]
CARD = "---\nlicense: apache-2.0\n---\n\n# A\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two models in local folders, a of three shards; recipe.yaml names them on the Hub."""
    place = tmp_path / "here"
    base = llama_tensors(0)
    save_model(place / "local/a", base, shards=3)
    save_model(place / "local/b", near(base, 1))
    (place / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def models(hub: HubServer, folder: Path) -> HubServer:
    """Both models on the Hub; a has many files that no merge needs, b a later commit with other weights."""
    other = {
        "original/params.json": b"{}",
        "original/consolidated.00.pth": b"x" * 200_000,
        "model-q4.gguf": b"y" * 200_000,
        "pytorch_model.bin": b"z" * 200_000,
        "figure.png": b"png",
    }
    hub.create("org/a", {**files_of(folder / "local/a"), **other, "README.md": CARD.encode()})
    commit = hub.create("org/b", {**files_of(folder / "local/b"), "README.md": CARD.encode()})
    hub.tag("org/b", "v1", commit)
    hub.commit("org/b", {"model.safetensors": files_of(folder / "local/b")["model.safetensors"][:-4] + bytes(4)})
    return hub


def weights_sent(server: HubServer) -> list[str]:
    """The names of the large files that were downloaded whole or in part."""
    found = [re.search(r"/resolve/\w+/(.*)", r.path) for r in server.requests if r.method == "GET"]
    return sorted({match[1] for match in found if match and not match[1].endswith((".json", ".md", ".txt", ".png"))})


def test_the_result_is_that_of_local_copies(folder: Path) -> None:
    said = json.loads(run("merge", "recipe.yaml", "out", "--json").stdout)
    assert said["already_there"] is False and said["pushed"] is None
    (folder / "local.yaml").write_text(RECIPE.replace("org/a", "local/a").replace("org/b@v1", "local/b"))
    run("merge", "local.yaml", "same")
    ours, theirs = files_of(folder / "out"), files_of(folder / "same")
    assert ours.pop("figure.png") == b"png"
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "README.md",
        "merge.lock.json",
        "mergekit_config.yml",
    }
    assert answer(run("verify", "out", "--json"))["good"]


def test_only_needed_files_are_downloaded(
    models: HubServer,
) -> None:
    merge("recipe.yaml", "out")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weights_sent(models) == sorted(["model.safetensors", *shards])
    got = "\n".join(request.path for request in models.requests)
    for name in ("original", "gguf", "pytorch_model"):
        assert name not in got
    assert "figure" in got


def test_the_commit_is_recorded(models: HubServer, folder: Path) -> None:
    merge("recipe.yaml", "out")
    a, b = models.head("org/a"), models.revision("org/b", "v1")
    lock = json.loads((folder / "out/merge.lock.json").read_text())
    assert [entry["model"] for entry in lock["inputs"]] == [f"org/a@{a}", f"org/b@{b}"]
    assert {file["commit"] for entry in lock["inputs"] for file in entry["files"]} == {f"org/a@{a}", f"org/b@{b}"}
    assert "mtime_ns" not in json.dumps(lock)
    assert [entry["model"] for entry in lock["recipe"]["models"]] == [f"org/a@{a}", f"org/b@{b}"]
    card = (folder / "out/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model:\n- org/a\n- org/b\nbase_model_relation: merge\n")
    assert str(folder) not in card and str(folder.parent) not in json.dumps(lock)


def test_the_recipe_of_the_card_makes_the_same_again(folder: Path) -> None:
    merge("recipe.yaml", "out")
    shown = re.findall(r"```yaml\n(.*?)```", (folder / "out/README.md").read_text(), re.DOTALL)
    (folder / "again.yaml").write_text(shown[0])
    merge("again.yaml", "again")
    ours, theirs = output_of(folder / "out"), output_of(folder / "again")
    assert {name for name in ours if ours[name] != theirs[name]} <= {"merge.lock.json"}


def test_a_plan_downloads_no_weights(models: HubServer, folder: Path) -> None:
    planned = answer(run("plan", "recipe.yaml", "--json"))
    sizes = {
        name: sum(
            len(d) for n, d in files_of(folder / f"local/{name}").items() if "safetensors" in n and "index" not in n
        )
        for name in "ab"
    }
    assert [(m["repo"], m["commit"], m["download"]) for m in planned["models"]] == [
        ("org/a", models.head("org/a"), sizes["a"]),
        ("org/b", models.revision("org/b", "v1"), sizes["b"]),
    ]
    cache = [path for path in folder.parent.rglob("*.safetensors") if "snapshots" in path.parts]
    assert cache == []
    text = run("plan", "recipe.yaml").stdout
    assert f"org/a: commit {models.head('org/a')}, " in text and "to download" in text
    merge("recipe.yaml", "out")
    assert "in the cache" in run("plan", "recipe.yaml").stdout
    assert {m["download"] for m in answer(run("plan", "recipe.yaml", "--json"))["models"]} == {0}


def test_the_plan_does_not_depend_on_the_cache() -> None:
    before = answer(run("plan", "recipe.yaml", "--json"))["digest"]
    merge("recipe.yaml", "out")
    assert answer(run("plan", "recipe.yaml", "--json"))["digest"] == before
    assert answer(run("merge", "recipe.yaml", "out", "--json"))["already_there"]


def test_a_branch_that_moves_makes_another_plan(models: HubServer, folder: Path) -> None:
    merge("recipe.yaml", "out")
    changed = files_of(folder / "local/a")["model-00001-of-00003.safetensors"]
    models.commit("org/a", {"model-00001-of-00003.safetensors": changed[:-4] + bytes(4)})
    assert "is not the output of this merge" in refusal(run("merge", "recipe.yaml", "out"))
    merge("recipe.yaml", "out", overwrite=True)
    assert models.head("org/a") in (folder / "out/README.md").read_text()


def test_offline_a_merge_uses_the_cache(models: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge("recipe.yaml", "out")
    asked = len(models.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("merge", "recipe.yaml", "offline", "--json")
    said = json.loads(result.stdout)
    assert said["warnings"] == [
        f"{name}: offline, so only its files in the cache were used" for name in ("org/a", "org/b@v1")
    ]
    assert output_of(folder / "offline") == output_of(folder / "out")
    assert len(models.requests) == asked


def test_offline_the_message_names_missing_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(run("merge", "recipe.yaml", "out"))
    assert "org/a" in message and "org/b@v1" in message and "HF_HUB_OFFLINE forbids downloads" in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run("plan", "recipe.yaml")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(run("merge", "recipe.yaml", "out"))
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [(None, "1", "TRANSFORMERS_OFFLINE"), ("1", "1", "HF_HUB_OFFLINE"), ("1", None, "HF_HUB_OFFLINE")],
)
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.usefixtures("folder")
def test_the_message_names_the_variable_that_is_set(
    first: str | None, second: str | None, named: str, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planned:
        run("plan", "recipe.yaml")
    for name, value in (("HF_HUB_OFFLINE", first), ("TRANSFORMERS_OFFLINE", second)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(run("merge", "recipe.yaml", "out"))
    other = ({"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} - {named}).pop()
    assert named in message and other not in message and "org/a" in message


@pytest.mark.parametrize("name", ["HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HF_API_TOKEN"])
def test_a_token_under_a_name_that_is_not_read_is_named(
    name: str, models: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.create("org/secret", files_of(folder / "local/b"), private=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("org/b@v1", "org/secret"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv(name, TOKEN)
    message = refusal(run("plan", "recipe.yaml"))
    assert f"set HF_TOKEN ({name} is set, but no program of the Hub reads it)" in message and TOKEN not in message


def test_a_token_under_the_old_name_is_read(models: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.create("org/secret", files_of(folder / "local/b"), private=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("org/b@v1", "org/secret"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", f"{TOKEN}\n")
    assert answer(run("plan", "recipe.yaml", "--json"))["tensors"] > 0


def test_one_message_names_all_models_that_are_not_available(models: HubServer, folder: Path) -> None:
    models.create("org/secret", files_of(folder / "local/a"), private=True)
    models.create("org/gated", files_of(folder / "local/a"))
    models.gate("org/gated")
    entries = ("org/nothing", "org/b@no-such-branch", "org/gated@main")
    models_text = "".join(f"  - {{model: {name}, parameters: {{weight: 1}}}}\n" for name in entries)
    (folder / "recipe.yaml").write_text(f"merge_method: linear\nmodels:\n{models_text}")
    message = refusal(run("merge", "recipe.yaml", "out"))
    assert "3 problems" in message
    assert "found no model org/nothing at " in message
    assert "\n  org/b@no-such-branch: the repository exists, but has no such branch, tag or commit" in message
    assert re.search(rf"org/gated@\w{{40}} is gated: accept its conditions on {models.url}/org/gated with", message)
    assert list(folder.glob("out*")) == []


def test_a_private_model_needs_a_token(models: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.create("org/secret", files_of(folder / "local/b"), private=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("org/b@v1", "org/secret"))
    assert answer(run("plan", "recipe.yaml", "--json"))["tensors"] > 0
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(run("plan", "recipe.yaml"))
    assert "org/secret" in message and "no token was found: set HF_TOKEN, or run `hf auth login`" in message


def test_a_folder_of_that_name_comes_first(folder: Path) -> None:
    save_model(folder / "org/a", llama_tensors(7))
    (folder / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/a}]\n")
    merge("recipe.yaml", "out")
    assert torch.equal(
        open_checkpoint("out").read("model.norm.weight"), llama_tensors(7)["model.norm.weight"].flatten()
    )
    assert "commit" not in (folder / "out/merge.lock.json").read_text()


def test_torch_archives_are_read_from_the_hub_where_there_is_nothing_else(hub: HubServer, folder: Path) -> None:
    tensors = llama_tensors(0)
    torch.save(tensors, folder / "pytorch_model.bin")
    hub.create("org/old", {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(), "config.json": b"{}"})
    (folder / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/old}]\n")
    merge("recipe.yaml", "out")
    assert all(torch.equal(open_checkpoint("out").read(n), x.flatten()) for n, x in tensors.items())
    lock = json.loads((folder / "out/merge.lock.json").read_text())
    assert lock["inputs"][0]["files"][0]["commit"] == f"org/old@{hub.head('org/old')}"


def test_headers_are_checked_on_the_hub_as_on_the_disk(hub: HubServer, folder: Path) -> None:
    whole = files_of(folder / "local/b")
    hub.create("org/cut", {**whole, "model.safetensors": whole["model.safetensors"][:-100]})
    with pytest.raises(FormatError, match=r"org/cut@\w{40}/model.safetensors is truncated"):
        open_checkpoint("org/cut")
    hub.create("org/none", {"config.json": b"{}"})
    with pytest.raises(FormatError, match=r"org/none@\w{40} holds no model: expected model.safetensors"):
        open_checkpoint("org/none")
    files = files_of(folder / "local/a")
    del files["model-00002-of-00003.safetensors"]
    hub.create("org/gap", files)
    with pytest.raises(FormatError, match=r"shards named in .* are missing: model-00002-of-00003.safetensors"):
        open_checkpoint("org/gap")


def test_a_header_larger_than_the_first_request(hub: HubServer, folder: Path) -> None:
    tensors = {f"a.rather.long.name.of.a.tensor.number.{i}": torch.tensor([float(i)]) for i in range(2000)}
    save_file(tensors, folder / "model.safetensors")
    hub.create("org/many", {"model.safetensors": (folder / "model.safetensors").read_bytes()})
    checkpoint = open_checkpoint("org/many")
    assert len(checkpoint) == 2000 and checkpoint.absent
    assert checkpoint.read("a.rather.long.name.of.a.tensor.number.1999").tolist() == [1999.0]
    assert not checkpoint.absent


def test_inspect_reads_headers_alone(models: HubServer, folder: Path) -> None:
    data = answer(run("inspect", "org/a", "--json"))
    assert data["path"] == f"org/a@{models.head('org/a')}" and len(data["files"]) == 3
    local = answer(run("inspect", "local/a", "--json"))
    assert data["tensors"] == local["tensors"]
    assert [path for path in folder.parent.rglob("*.safetensors") if "snapshots" in path.parts] == []


def test_the_content_is_that_of_a_copy() -> None:
    assert open_checkpoint("org/a").content == open_checkpoint("local/a").content


def test_a_model_of_the_hub_is_aligned_to_another(models: HubServer, folder: Path) -> None:
    quickstart = ROOT / "recipes/quickstart"
    for name in ("docs", "code"):
        models.create(f"org/{name}", files_of(quickstart / name))
    text = (
        "merge_method: linear\nmodels:\n  - model: org/docs\n"
        "  - {model: org/code, align: {to: org/docs, method: weight_matching}}\nparameters: {weight: 1}\n"
    )
    (folder / "recipe.yaml").write_text(text)
    (folder / "local.yaml").write_text(text.replace("org/", f"{quickstart}/"))
    merge("recipe.yaml", "out")
    merge("local.yaml", "same")
    ours, theirs = files_of(folder / "out"), files_of(folder / "same")
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "README.md",
        "merge.lock.json",
        "mergekit_config.yml",
    }


def test_licenses_that_differ_are_for_a_human_to_judge(models: HubServer, folder: Path) -> None:
    models.commit("org/a", {"README.md": b"---\nlicense: other\nlicense_name: mine\n---\n"})
    merge("recipe.yaml", "out")
    card = (folder / "out/README.md").read_text()
    assert card.startswith("---\nlicense: other\nbase_model:\n")
    assert re.search(r"- \[org/a@\w{40}\]\(https://huggingface.co/org/a\), license: mine\n- \[org/b@", card)


def test_the_room_for_all_models_is_checked_before_the_first_is_fetched(
    models: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lfm.store.snapshot.free_space", lambda _: 150_000)  # one of them would fit
    with pytest.raises(PlanError, match="make room"):
        merge("recipe.yaml", "out")
    assert [r for r in models.requests if r.path.startswith("/blob/") and r.status == 200] == []


def test_models_on_the_hub_are_read_by_ranges(
    models: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lfm.store.ranges.LARGEST", 30_000)
    merge("recipe.yaml", "streamed", stream_inputs=True)
    assert not [*(tmp_path / "client").rglob("*.safetensors")]
    answers = [r for r in models.requests if r.path.startswith("/blob/")]
    assert answers and all(r.status == 206 for r in answers)
    asked = [r for r in models.requests if "/resolve/" in r.path and r.path.endswith(".safetensors")]
    assert len(asked) < len(answers) / 2  # the storage is asked without the Hub
    models.fault("GET", "/blob/", status=403, body=b"expired", times=1)
    merge("recipe.yaml", "renewed", stream_inputs=True)
    assert not any(r.token for r in models.requests if r.path.startswith("/blob/"))
    (folder / "recipe.yaml").write_text(RECIPE.replace("org/a", "hf://org/a"))
    merge("recipe.yaml", "downloaded")
    assert output_of(folder / "streamed").keys() == output_of(folder / "downloaded").keys()
    for name, data in output_of(folder / "streamed").items():
        assert name in ("README.md", "merge.lock.json") or data == output_of(folder / "downloaded")[name]


def test_a_server_without_ranges_cannot_stream(models: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lfm.store.ranges.LARGEST", 30_000)
    planned = plan_merge("recipe.yaml", "out").result
    models.fault("GET", "/blob/", status=200, body=b"x" * 300_000, times=None)
    with pytest.raises(PlanError, match="does not answer requests for a range of bytes; leave --stream-inputs out"):
        merge(planned, stream_inputs=True)


def test_one_model_under_two_names_is_refused(models: HubServer, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("org/b@v1", "org/a@main"))
    message = refusal(run("plan", "recipe.yaml"))
    assert f"org/a and org/a@main are one model, org/a@{models.head('org/a')}, under two names" in message


def test_no_old_commit_is_taken_where_the_hub_fails_to_answer(models: HubServer, folder: Path) -> None:
    run("plan", "recipe.yaml")
    changed = files_of(folder / "local/a")["model-00001-of-00003.safetensors"]
    models.commit("org/a", {"model-00001-of-00003.safetensors": changed[:-4] + bytes(4)})
    models.fault("GET", "^/api/models/org/a(/revision/main)?$", status=503, times=1)
    result = run("plan", "recipe.yaml", "--json")
    assert result.exit_code == 2 or json.loads(result.stdout)["models"][0]["commit"] == models.head("org/a")


@pytest.mark.parametrize("path", ["../../here/private", "/etc", 1, None])
def test_a_list_of_modules_that_leads_away_is_refused(path: object, models: HubServer, folder: Path) -> None:
    (folder / "private").mkdir()
    (folder / "private/secret.json").write_text("{}")
    files = {**files_of(folder / "local/b"), "modules.json": json.dumps([{"path": path}]).encode()}
    models.create("org/bad", files)
    (folder / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/bad}]\n")
    assert "expected a list of modules, each with the path of a folder in this one" in refusal(
        run("plan", "recipe.yaml")
    )


@pytest.mark.parametrize("name", ["/etc/model.safetensors", "../../../local/b/model.safetensors", 3])
def test_an_index_that_leads_away_is_refused(name: object, models: HubServer, folder: Path) -> None:
    index = {"weight_map": {"a": name}}
    models.create("org/bad", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(FormatError, match="is not a file of that folder"):
        open_checkpoint("org/bad")
    assert (folder / "local").is_dir()


def test_mergekits_revision_is_read() -> None:
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": {"model": {"path": "org/b", "revision": "v1"}}}],
    }
    merge(recipe, "out")
    assert torch.equal(open_checkpoint("out").read("lm_head.weight"), open_checkpoint("local/b").read("lm_head.weight"))


def test_a_full_disk_is_noticed_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lfm.store.snapshot.free_space", lambda _: 1000)
    with pytest.raises(PlanError, match=r"need .* GB more in the cache of the Hub, .*make room, or set HF_HOME"):
        merge("recipe.yaml", "out")
    assert list(folder.glob("out*")) == []


@pytest.fixture
def lora(models: HubServer, folder: Path) -> HubServer:
    """An adapter on the Hub, its second commit, and a copy of the first one here."""
    place = folder / "local/lora"
    place.mkdir()
    (name, spec), *_ = ((name, spec) for name, spec in open_checkpoint("local/a").items() if "q_proj" in name)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(2, spec.shape[1]),
        f"{key}.lora_B.weight": torch.ones(spec.shape[0], 2),
    }
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    commit = models.create("org/lora", {**files_of(place), "optimizer.pt": b"x" * 200_000})
    models.tag("org/lora", "v1", commit)
    models.commit("org/lora", {"adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 400}'})
    return models


def test_an_adapter_on_the_hub_is_read_at_its_commit(lora: HubServer, folder: Path) -> None:
    """A plan reads headers; the merge downloads the adapter, not what lies beside it; its commit is recorded."""
    text = "models: [{model: MODEL+0.5*LORA}]\nmerge_method: passthrough\n"
    (folder / "adapted.yaml").write_text(text.replace("MODEL", "org/a").replace("LORA", "org/lora@v1"))
    (folder / "local.yaml").write_text(text.replace("MODEL", "local/a").replace("LORA", "local/lora"))
    assert run("plan", "adapted.yaml").exit_code == 0
    assert not (set(weights_sent(lora)) & {"optimizer.pt"})
    merge("adapted.yaml", "out")
    merge("local.yaml", "same")
    assert open_checkpoint("out").digests == open_checkpoint("same").digests != open_checkpoint("local/a").digests
    assert "optimizer.pt" not in weights_sent(lora) and "adapter_model.safetensors" in weights_sent(lora)
    lock = json.loads((folder / "out/merge.lock.json").read_text())
    commits = {file["commit"] for entry in lock["inputs"] for file in entry["files"] if "commit" in file}
    assert commits == {f"org/a@{lora.head('org/a')}", f"org/lora@{lora.revision('org/lora', 'v1')}"}
    card = (folder / "out/README.md").read_text()
    assert "base_model:\n- org/a\n- org/lora\n" in card and str(folder) not in card


@pytest.mark.usefixtures("folder")
def test_the_data_of_a_model_and_its_adapter_are_downloaded_when_read(lora: HubServer) -> None:
    """`inspect` reads headers, unless the content is asked for."""
    said = answer(run("inspect", "org/a+0.5*org/lora@v1", "--json"))
    assert "adapter_model.safetensors" not in {path.name for path in Path().glob("../**/snapshots/*/*")}
    local = answer(run("inspect", "local/a+0.5*local/lora", "--json", "--content"))
    assert said["tensors"] == local["tensors"]
    assert answer(run("inspect", "org/a+0.5*org/lora@v1", "--json", "--content"))["content"] == local["content"]
    text = str(model_folder("org/a+0.5*org/lora@v1"))  # as commands that run models get it
    assert text.count("/snapshots/") == 2 and open_model(text).content == local["content"]
    assert "optimizer.pt" not in weights_sent(lora)
