"""Merges from buckets and into them: the bytes of a merge of local folders, through failures of any kind."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapters import tiny_model
from helpers_commands import run, start
from helpers_lora import save_lora
from helpers_processes import Processes, on
from helpers_s3 import BUCKET, Proxy, ask, upload
from models import files_of, save_checkpoint

from mergekit_lfm import merge, open_checkpoint, plan_merge, push, verify_output
from mergekit_lfm.api.engines import stream_models
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store import ranges
from mergekit_lfm.store.buckets import bucket_name, client, put, snapshots
from mergekit_lfm.store.buckets.snapshots import list_folder
from mergekit_lfm.store.elsewhere import shown_name

SHAPES = {"a.weight": (300, 200), "b.bias": (7,), "c.weight": (64, 1000), "d.weight": (2000, 33), "e.weight": (5,)}
TIES = {"merge_method": "ties", "parameters": {"density": 0.3}}
LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """The address of a folder for this test alone."""
    return f"s3://{BUCKET}/{request.node.name.partition('[')[0]}-{random.SystemRandom().randrange(10**9)}"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two models of it, each in two shards."""
    folders = []
    for seed, name in enumerate(("base", "left", "right")):
        draw = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        folders.append(save_checkpoint(tmp_path / name, tensors, {"model_type": "any"}, shards=2))
    return folders


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and parts so small that even these files have several, and no pauses."""
    monkeypatch.setattr(ranges, "LARGEST", 50_000)
    monkeypatch.setattr(ranges, "SMALLEST", 50_000)
    monkeypatch.setattr(snapshots, "CHUNK", 100_000)
    monkeypatch.setattr(client, "PAUSE_S", 0.01)


def recipe_of(models: list[str], settings: Mapping[str, Any] = TIES) -> dict[str, Any]:
    """A recipe of a base, if it takes one, and two models."""
    base = {"base_model": models[0]} if settings["merge_method"] != "linear" else {}
    return {**settings, **base, "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models[1:]]}


def weights(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with weights and their index."""
    return {name: data for name, data in files.items() if name.startswith("model")}


def there(address: str) -> set[str]:
    """The files at an address."""
    name = bucket_name(address)
    assert name is not None
    return set(list_folder(name))


def local(models: list[Path], out: Path, settings: Mapping[str, Any] = TIES) -> dict[str, bytes]:
    """The weights of a merge of the local folders."""
    merge(recipe_of([str(model) for model in models], settings), out, card=False)
    return weights(files_of(out))


@pytest.mark.parametrize("stream", [False, True], ids=["downloaded", "streamed"])
def test_models_in_a_bucket_merge_as_local_ones(
    stream: bool, s3: Proxy, models: list[Path], place: str, tmp_path: Path
) -> None:
    expected = local(models, tmp_path / "expected")
    recipe = recipe_of([upload(model, f"{place}/{model.name}") for model in models])
    outcome = merge(recipe, tmp_path / "out", card=False, stream_inputs=stream)
    assert weights(files_of(tmp_path / "out")) == expected
    copies = [path for path in (tmp_path / "cache").rglob("*.safetensors") if "buckets" in path.parts]
    assert len(copies) == (0 if stream else 6)
    assert not [*(tmp_path / "cache").rglob("*.part")]
    lock = (tmp_path / "out" / "merge.lock.json").read_text()
    assert "base@" in lock and BUCKET not in lock
    s3.requests.clear()
    assert merge(recipe, tmp_path / "out", card=False, stream_inputs=stream).already_there
    assert not any("safetensors" in path and method == "GET" for method, path, _ in s3.requests) or stream
    assert outcome.digest


def test_a_model_in_a_bucket_is_shown_by_its_address() -> None:
    copy = Path("/cache/buckets/base-1f/2f")
    for text, shown in (("s3://models/base", "s3://models/base"), ("base", str(copy)), ("s3://models", str(copy))):
        assert shown_name(text, copy) == shown


def test_a_file_an_adapter_and_a_stack_from_a_bucket(s3: Proxy, tmp_path: Path, place: str) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "llama")
    save_lora(model, tmp_path / "lora", 1, r=2, target_modules=["q_proj"])
    base = upload(tmp_path / "llama", f"{place}/llama")
    lora = upload(tmp_path / "lora", f"{place}/lora")
    stack = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "", "layer_range": [0, 1]}]}] * 2}
    for number, (here, far) in enumerate(
        [(tmp_path / "llama", base), (f"{tmp_path / 'llama'}+{tmp_path / 'lora'}", f"{base}+{lora}")]
    ):
        for name, model_ref in (("here", here), ("far", far)):
            sliced = json.loads(json.dumps(stack))
            for entry in sliced["slices"]:
                entry["sources"][0]["model"] = str(model_ref)
            merge(sliced, tmp_path / f"{name}-{number}", card=False, stream_inputs=True)
        assert weights(files_of(tmp_path / f"here-{number}")) == weights(files_of(tmp_path / f"far-{number}"))
    alone = f"{base}/model.safetensors"
    assert open_checkpoint(alone).keys() == open_checkpoint(tmp_path / "llama").keys()
    assert s3.sent


def test_failures_on_the_way_are_survived(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    """Every third request fails, of those that read and of those that write."""
    expected = local(models, tmp_path / "expected")
    recipe = recipe_of([upload(model, f"{place}/{model.name}") for model in models])
    draw, count = random.Random(1), 0

    def fail(method: str, *_: object) -> str | None:
        nonlocal count
        count += 1
        kind = draw.choice(["503", "cut", "drop", "slow", "500", "429"])
        return kind if count % 3 == 0 and method in ("GET", "PUT", "HEAD") else None

    s3.faults = fail
    for stream in (False, True):
        out = f"{place}/out-{stream}"
        merge(recipe, out, card=False, stream_inputs=stream)
        s3.faults = []
        pulled = merge({"merge_method": "passthrough", "models": [{"model": out}]}, tmp_path / f"{stream}", card=False)
        assert weights(files_of(tmp_path / f"{stream}")) == expected
        assert pulled.path
        s3.faults = fail


def test_a_store_that_keeps_failing_is_told_and_goes_on(
    s3: Proxy, models: list[Path], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put, "PART", 5 << 20)  # no store takes smaller ones
    expected = local(models, tmp_path / "expected")
    recipe, out = recipe_of([str(model) for model in models]), f"{place}/out"
    s3.faults = lambda method, path, _: "403" if "00002-of" in path and method in ("PUT", "POST") else None
    with pytest.raises(PlanError, match=r"00002-of-00002.safetensors: the store refuses the request; set AWS_ACCESS"):
        merge(recipe, out)
    assert {"merge.unfinished", "model-00001-of-00002.safetensors"} == there(out)
    with pytest.raises(
        PlanError, match=r"merge\.unfinished: another merge writes there, or was interrupted; wait for it"
    ):
        merge(recipe_of([str(model) for model in models], LINEAR), out)
    s3.faults = []
    s3.requests.clear()
    merge(recipe, out)
    assert not any("00001-of" in path and method in ("PUT", "POST") for method, path, _ in s3.requests)
    assert "merge.unfinished" not in there(out) and "merge.lock.json" in there(out)
    assert verify_output(out).result.differences == ()
    assert not (tmp_path / "cache" / "mergekit_lfm" / "outgoing").is_dir() or not [
        *(tmp_path / "cache" / "mergekit_lfm" / "outgoing").iterdir()
    ]
    merge({"merge_method": "passthrough", "models": [{"model": out}]}, tmp_path / "copy", card=False)
    assert weights(files_of(tmp_path / "copy")) == expected


def test_a_large_file_goes_in_parts(s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through cuts of the answers that begin and end the upload, and of parts; a refusal leaves nothing behind."""
    monkeypatch.setattr(put, "PART", 5 << 20)  # no store takes smaller ones
    save_checkpoint(tmp_path / "large", {"x": torch.arange(1_600_000)}, {})
    s3.faults = lambda method, path, _: "403" if method == "PUT" and "partNumber=3" in path else None
    with pytest.raises(PlanError, match="the store refuses"):
        push(tmp_path / "large", place)
    key = f"{place.rpartition('/')[2]}/model.safetensors"
    assert key.encode() not in ask(s3.url, "GET", f"/{BUCKET}?uploads") and "model.safetensors" not in there(place)
    faults = {"uploads=": "cut", "partNumber=2": "503", "partNumber=3": "drop", "uploadId": "cut"}

    def fail(method: str, path: str, _: Message) -> str | None:
        key = next((key for key in faults if key in path), "")
        return faults.pop(key, None) if method in ("PUT", "POST") else None

    s3.faults = fail
    push(tmp_path / "large", place)
    s3.faults = []
    assert not faults and len({path for _, path, _ in s3.requests if "partNumber" in path}) >= 3
    assert torch.equal(open_checkpoint(place).read("x"), torch.arange(1_600_000))


def test_an_output_in_a_bucket_is_made_once_and_replaced_if_asked(
    s3: Proxy, models: list[Path], place: str, tmp_path: Path
) -> None:
    out, refs = f"{place}/out", [str(model) for model in models]
    assert not merge(recipe_of(refs), out).already_there
    upload(save_checkpoint(tmp_path / "mine", {"x": torch.ones(1)}, {}), f"{out}/mine")
    s3.requests.clear()
    again = merge(recipe_of(refs), out)
    assert again.already_there and not any(method in ("PUT", "POST", "DELETE") for method, *_ in s3.requests)
    with pytest.raises(PlanError, match="of another model; choose another place, or use --overwrite"):
        merge(recipe_of(refs, LINEAR), out)
    before = there(out)
    merge(recipe_of(refs, LINEAR), out, max_shard_size="10MB", overwrite=True)
    assert {name for name in before if name.startswith("model")} - there(out)
    assert "mine/model.safetensors" in there(out) and "model.safetensors" in there(out)
    assert verify_output(out).result.differences == ()
    changed = models[1] / "model-00001-of-00002.safetensors"
    changed.write_bytes(changed.read_bytes()[:-4] + bytes(4))
    with pytest.raises(PlanError, match="was made from other inputs"):
        merge(recipe_of(refs, LINEAR), out, max_shard_size="10MB")


def test_a_folder_is_pushed_and_compared(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    merge(recipe_of([str(model) for model in models]), tmp_path / "out", push_to=f"{place}/a", verify_push=True)
    pushed = push(tmp_path / "out", f"{place}/a").result
    assert pushed.files == () and pushed.url == f"{place}/a"
    assert push(tmp_path / "out", f"{place}/b", pull_back=True).result.verified
    assert s3.sent
    for options, words in (({"private": True}, "private has no effect"), ({"message": "m"}, "message has no effect")):
        with pytest.raises(PlanError, match=words):
            push(tmp_path / "out", f"{place}/c", **options)
    assert there(f"{place}/c") == set()


def test_other_processes_and_other_runs_read_by_ranges(
    s3: Proxy, models: list[Path], place: str, tmp_path: Path
) -> None:
    expected = local(models, tmp_path / "expected")
    recipe = recipe_of([upload(model, f"{place}/{model.name}") for model in models])
    for number in (2, 1):
        merge(recipe, tmp_path / "parts", part=(number, 2), card=False, stream_inputs=True)
    plan = plan_merge(recipe, card=False, out=tmp_path / "processes").result.plan
    stream_models(plan, None, 2)
    execute(plan, tmp_path / "processes", threads=2, engine=on(Processes()))
    for out in ("parts", "processes"):
        assert weights(files_of(tmp_path / out)) == expected
    assert s3.sent


def test_files_of_others_stay(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    recipe, out = recipe_of([str(model) for model in models]), f"{place}/w%20x/out"
    name = bucket_name(out)
    assert name is not None
    merge(recipe, tmp_path / "out", push_to=out)
    put.put_text(name, "README.md", "# Mine")
    again = push(tmp_path / "out", out).result
    assert again.kept_card and again.files == ("MERGE.md", "merge.lock.json")
    assert put.read_small(name, "README.md", 99) == b"# Mine" and verify_output(out).result.differences == ()
    put.put_text(name, "pytorch_model.bin", "theirs")
    with pytest.raises(PlanError, match=r"holds pytorch_model\.bin, which is of another model"):
        push(tmp_path / "out", out)
    put.delete_files(name, ["pytorch_model.bin"])
    put.put_text(name, "config.json", "{}")
    with pytest.raises(PlanError, match=r"holds config\.json, which is of another model"):
        push(tmp_path / "out", out)
    assert push(tmp_path / "out", out, overwrite=True).result.files
    assert (
        ask(s3.url, "GET", f"/{BUCKET}?list-type=2&prefix={place.rpartition('/')[2]}/w%2520x/out/").count(b"<Key>") > 5
    )


def test_one_of_two_merges_to_a_place_is_refused(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    """The second begins when the first has looked, and before it has put its mark."""
    refs, out, seen = [str(model) for model in models], f"{place}/out", list[str]()

    def begin(method: str, path: str, _: Message) -> None:
        if method == "PUT" and path.endswith("merge.unfinished"):
            s3.faults = []
            with pytest.MonkeyPatch.context() as other:
                other.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
                seen.append(str(merge(recipe_of(refs, LINEAR), out).digest))

    s3.faults = begin
    with pytest.raises(PlanError, match="which is of another model"):
        merge(recipe_of(refs), out)
    assert seen and verify_output(out).digest == seen[0]


def test_a_folder_without_a_lock_is_pushed_again(s3: Proxy, models: list[Path], place: str) -> None:
    assert len(push(models[0], f"{place}/a").result.files) == 4
    assert push(models[0], f"{place}/a").result.files == ()
    s3.faults = lambda method, path, _: "403" if method == "PUT" and path.endswith("config.json") else None
    with pytest.raises(PlanError, match="the store refuses"):
        push(models[0], f"{place}/b")
    s3.faults = []
    assert push(models[0], f"{place}/b").result.files == ("config.json", "model.safetensors.index.json")
    with pytest.raises(PlanError, match="of another model"):
        push(models[1], f"{place}/b")


def test_an_output_that_was_changed_there_is_not_called_done(
    s3: Proxy, models: list[Path], place: str, tmp_path: Path
) -> None:
    recipe, out, shard = recipe_of([str(model) for model in models]), f"{place}/out", "model-00001-of-00002.safetensors"
    merge(recipe, out)
    pushed = merge(recipe, out, verify_push=True).result.pushed
    assert pushed is not None and pushed.verified and s3.sent
    name = bucket_name(out)
    assert name is not None
    put.put_text(name, shard, "x" * list_folder(name)[shard][0])
    with pytest.raises(PlanError, match=f"{shard}, which is of another model"):
        merge(recipe, out)
    merge(recipe, out, overwrite=True)
    assert verify_output(out).result.differences == ()
    assert not [*(tmp_path / "cache").rglob("outgoing/*")]


def test_an_input_that_changes_is_told(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    recipe = recipe_of([upload(model, f"{place}/{model.name}") for model in models])
    name = "model-00001-of-00002.safetensors"

    def change(_: str, path: str, headers: Message) -> None:
        if path.endswith(f"left/{name}") and headers.get("Range", "").startswith("bytes=50000"):
            s3.faults = []
            (models[1] / name).write_bytes((models[2] / name).read_bytes())
            upload(models[1], f"{place}/left")

    s3.faults = change
    with pytest.raises(FormatError, match=f"left/{name} was changed since it was listed; run the command again"):
        merge(recipe, tmp_path / "out", stream_inputs=True)
    assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "new", stream_inputs=True)


def test_addresses_and_places_that_cannot_be(
    s3: Proxy, models: list[Path], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [str(model) for model in models]
    for far, words in (
        (f"{place}/nothing", "found nothing there; give the address of a folder or a file"),
        ("s3://no-such-bucket/x", "there is no bucket no-such-bucket"),
        ("s3://models", "addresses of buckets have the form s3://bucket/path"),
        ("az://account/container", "addresses of buckets have the form"),
        (f"{place}/../x", "addresses of buckets have the form"),
    ):
        with pytest.raises(PlanError, match=words):
            merge(recipe_of([far, *refs[1:]]), tmp_path / "out")
    for options, words in (
        ({"part": (1, 2)}, "OUT is in a bucket, and each run would make it for itself"),
        ({"engine": "ray", "ray_address": "host:1"}, "OUT is in a bucket, and would be made in the cache"),
        ({"push_to": "org/name"}, "is also to be pushed to org/name"),
        ({"private": True}, "--private is about a repository on the Hub; leave it out"),
        ({"memory": "1KB"}, "needs"),
    ):
        with pytest.raises(PlanError, match=words):
            merge(recipe_of(refs), f"{place}/out", **options)
    stages = [{**recipe_of(refs), "name": "one"}, {"merge_method": "passthrough", "models": [{"model": "one"}]}]
    with pytest.raises(PlanError, match="the recipe has stages, whose results stay beside OUT; give a folder"):
        merge(stages, f"{place}/out")
    for where in (place, f"{place}/base/out", f"{place}/base"):
        with pytest.raises(PlanError, match="lie in one another; choose another place"):
            merge(recipe_of([upload(models[0], f"{place}/base"), *refs[1:]]), where, overwrite=True)
    assert there(f"{place}/out") == set() and "merge.unfinished" not in there(place)
    for key, value in (("AWS_ENDPOINT_URL", "127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "key\n")):
        with monkeypatch.context() as other:
            other.setenv(key, value)
            client.open_store.cache_clear()
            with pytest.raises(PlanError, match=key):
                merge(recipe_of([place, *refs[1:]]), tmp_path / "out")
    client.open_store.cache_clear()
    s3.faults = lambda *_: "403"
    with pytest.raises(PlanError, match="the store refuses the request; set AWS_ACCESS_KEY_ID"):
        merge(recipe_of([place, *refs[1:]]), tmp_path / "out")
    with pytest.raises(PlanError, match="the store refuses the request"):
        merge(recipe_of(refs), f"{place}/out")
    assert not [*(tmp_path / "cache").rglob("outgoing/*")]
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(PlanError, match=r'buckets need obstore: pip install "mergekit_lfm\[remote\]"'):
        merge(recipe_of([place, *refs[1:]]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_command_goes_on(s3: Proxy, models: list[Path], place: str, tmp_path: Path) -> None:
    """Killed while it sends, and while it reads."""
    expected = local(models, tmp_path / "expected")
    refs = [upload(model, f"{place}/{model.name}") for model in models]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of(refs)))
    out, seen = f"{place}/out", list[str]()

    def wait(method: str, path: str, _: Message) -> None:
        moment = "reading" if method == "GET" and "right/model" in path else "sending" if "out/config" in path else ""
        if moment and moment not in seen:
            seen.append(moment)
            process.send_signal(signal.SIGKILL)
            time.sleep(0.2)

    s3.faults = wait
    for _ in range(2):
        with start(tmp_path, "merge", "r.yaml", out, "--stream-inputs", "--no-card") as process:
            assert process.wait() == -signal.SIGKILL
    assert "merge.lock.json" not in there(out)
    done = run("merge", str(tmp_path / "r.yaml"), out, "--stream-inputs", "--no-card")
    assert done.exit_code == 0 and done.stdout.strip() == out
    assert seen == ["reading", "sending"]
    merge({"merge_method": "passthrough", "models": [{"model": out}]}, tmp_path / "copy", card=False)
    assert weights(files_of(tmp_path / "copy")) == expected


@pytest.mark.usefixtures("s3")
def test_the_command_shows_where_models_are(models: list[Path], place: str, tmp_path: Path) -> None:
    refs = [upload(model, f"{place}/{model.name}") for model in models]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of(refs)))
    shown = run("merge", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--dry-run", "--stream-inputs").stdout
    assert f"from a bucket  {refs[1]}: state " in shown and "to read by ranges" in shown
    data = json.loads(run("merge", str(tmp_path / "r.yaml"), f"{place}/out", "--json").stdout)
    assert data["out"] == data["pushed"]["url"] == f"{place}/out"
