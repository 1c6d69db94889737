"""Files beside the weights: those that load a model go along; secrets and links out of the folder do not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers_commands import answer, run
from hub_server import HubServer
from models import files_of, save_checkpoint

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import FormatError
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.save import save_checkpoint as save_view
from mergekit_lfm.store.sidecars import sidecars_of

SECRET = "hf_" + "a" * 34


def make_model(folder: Path, files: Mapping[str, str] | None = None, shards: int = 1) -> Path:
    """A model of two tensors, with more files."""
    save_checkpoint(folder, {"a": torch.ones(4), "b": torch.ones(2, 2)}, {"model_type": "x"}, shards=shards)
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def left_and_copied(folder: Path) -> tuple[dict[str, str], set[str]]:
    sidecars = sidecars_of(open_checkpoint(folder))
    return dict(sidecars.left), {name for name, _ in sidecars.files}


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "image_tokenizer.json",
        "tokenization_mine.py",
        "qwen.tiktoken",
        "sentencepiece.bpe.model",
        "vocab.txt",
    ],
)
def test_the_files_of_tokenizers_go_along(name: str, tmp_path: Path) -> None:
    left, copied = left_and_copied(make_model(tmp_path / "m", {name: "{}"}))
    assert left == {} and name in copied


@pytest.mark.parametrize(
    "name",
    [
        "token.txt",
        "hf_token.json",
        "access-token.txt",
        "API_KEY.json",
        "credentials.json",
        "prod.env",
        "server.pem",
        "id_ed25519",
        ".env",
        ".tokenizer.json",
        ".netrc.py",
    ],
)
def test_files_for_secrets_are_left_behind_and_named(name: str, tmp_path: Path) -> None:
    left, copied = left_and_copied(make_model(tmp_path / "m", {name: "{}"}))
    assert left == {name: "hidden" if name.startswith(".") else "named like a key or a token"}
    assert copied == {"config.json"}


def test_the_files_of_git_are_not_worth_a_word(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {".gitattributes": "", ".gitignore": ""})
    sidecars = sidecars_of(open_checkpoint(tmp_path / "m"))
    assert dict(sidecars.left).keys() == {".gitattributes", ".gitignore"} and sidecars.missed == ()


def test_a_file_with_a_secret_is_left_behind(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", {"processor_mine.py": f"import os\nTOKEN = '{SECRET}'\n"})
    assert left_and_copied(folder) == ({"processor_mine.py": "line 2 holds a token of the Hub"}, {"config.json"})


def test_a_link_out_of_the_folder_is_left_behind(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", {"tokenizer.json": "{}"})
    (tmp_path / "private").mkdir()
    (tmp_path / "private/x.json").write_text('{"mine": 1}')
    (folder / "vocab.json").symlink_to(tmp_path / "private/x.json")
    (folder / "vocab.txt").symlink_to("tokenizer.json")  # within the folder
    (folder / "1_Pooling").symlink_to(tmp_path / "private")
    left, copied = left_and_copied(folder)
    outside = "a link that leads out of the folder"
    assert left == {"vocab.json": outside, "1_Pooling": outside}
    assert copied == {"config.json", "tokenizer.json", "vocab.txt"}


def test_a_card_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (tmp_path / "other.md").write_text("---\nlicense: mit\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "other.md")
    assert read_license(folder) == {}
    assert save_view(open_checkpoint(folder), tmp_path / "out", {}, {}) == {}
    assert not (tmp_path / "out/README.md").exists()


def test_a_merge_names_all_that_it_leaves_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("m"), {"token.txt": SECRET, "tokenizer.json": "{}"})
    Path("r.yaml").write_text("merge_method: passthrough\nmodels: [{model: m}]\n")
    reason = "named like a key or a token"
    entries = answer(run("plan", "r.yaml", "--json"))["left_behind"]
    assert entries == [{"model": "m", "file": "token.txt", "reason": reason}]
    assert f"left behind: m: token.txt: {reason}\n" in run("plan", "r.yaml").stdout
    with pytest.warns(Finding, match=f"^m: token.txt was left behind: {reason}$"):
        merge("r.yaml", "out")
    assert SECRET.encode() not in b"".join(files_of(Path("out")).values()) and Path("out/tokenizer.json").exists()
    assert save_view(open_checkpoint("m"), Path("copy"), {}, {}) == {"token.txt": reason}
    assert not Path("copy/token.txt").exists()


def test_blobs_of_the_cache_of_the_hub_are_no_links_out_of_it(hub: HubServer, tmp_path: Path) -> None:
    """A file of a snapshot is a link to a blob beside it; private files are not downloaded."""
    files = files_of(make_model(tmp_path / "m", {"tokenizer.json": "{}", "token.txt": "x"}))
    hub.create("org/m", files)
    sidecars = sidecars_of(open_checkpoint("org/m"))
    assert {name for name, _ in sidecars.files} == {"config.json", "tokenizer.json"}
    assert all(path.is_symlink() for _, path in sidecars.files)
    assert [name for name, _ in sidecars.missed] == ["token.txt"]
    assert not any("token.txt" in request.path for request in hub.requests)


def test_weights_may_be_links_to_regular_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", shards=2)
    for shard in folder.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    assert len(open_checkpoint(folder)) == 2
    shard.unlink()
    os.mkfifo(tmp_path / "fifo")
    shard.symlink_to(tmp_path / "fifo")
    with pytest.raises(FormatError, match="is not a regular file, expected one with tensors"):
        open_checkpoint(folder)
