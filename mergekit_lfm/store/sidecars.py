"""The files beside the weights: configs, tokenizers, templates and the code that a config may name."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import SMALL, read_json
from mergekit_lfm.store.folder import leads_away
from mergekit_lfm.store.hub import HubName

SIDECAR = re.compile(
    r"^(config|generation_config|.*token.*|vocab|merges|.*(processor|preprocessor|feature_extractor).*|modules|"
    r"config_sentence_transformers|sentence_bert_config|chat_template|special_tokens_map|id2label|labels)\.(json|txt)$"
    r"|\.(jinja|py|tiktoken|spm|bpe)$|^(tokenizer|spiece|sentencepiece.*|.*token.*)\.model$"
)


def download(name: HubName) -> Path:
    """Download all files that loading a model needs, and return their folder. Raises as `open_checkpoint` does."""
    model = open_checkpoint(name)
    model.fetch()
    sidecars_of(model)
    return model.path


def sidecars_of(template: Checkpoint) -> tuple[Path, ...]:
    """The template's files that go beside the weights, and those of the modules that sentence-transformers lists.

    They are downloaded if the model is on the Hub.
    """
    folder = template.path
    if template.snapshot is not None:
        sizes = template.snapshot.sizes
        small = [name for name, nbytes in sizes.items() if nbytes <= SMALL]
        template.snapshot.fetch([name for name in small if "/" not in name and SIDECAR.search(name)])
        if "modules.json" in small:
            template.snapshot.fetch([name for name in small if name.endswith(".json") and name.count("/") == 1])
    if not folder.is_dir():
        return ()
    files = [path for path in folder.iterdir() if SIDECAR.search(path.name)]
    if (folder / "modules.json").exists():
        files += [path for name in _modules(folder) for path in (folder / name).glob("*.json")]
    return tuple(sorted(path for path in files if path.is_file() and path.stat().st_size <= SMALL))


def _modules(folder: Path) -> list[str]:
    """The folders of the modules that sentence-transformers lists. Raises FormatError for paths that lead elsewhere."""
    modules = read_json(folder / "modules.json")
    try:
        names = [entry["path"] for entry in modules]
    except (TypeError, KeyError):
        names = [None]
    wrong = [name for name in names if name != "" and leads_away(name)]
    if wrong:
        raise FormatError(
            f"{folder / 'modules.json'}: found {wrong[0]!r}, expected a list of modules, each with the path of a "
            "folder in this one"
        )
    return [name for name in names if name]
