"""The files that go beside the weights: the template's, and code that its config names and only another model has.

The output has all files that config.json, tokenizer_config.json and modules.json name, or the plan is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes, read_json
from mergekit_lfm.store.folder import MODULES, read_modules
from mergekit_lfm.store.sidecars import OTHER_WEIGHTS, examine, sidecars_of

CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
TOKENIZER = "tokenizer_config.json"
IMPORT = re.compile(rb"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)
WITHOUT_FILES = ".Normalize"  # the end of a module's class that saves nothing
RECORDED = "special_tokens_map_file"  # where transformers once found it; it is not read


@dataclass(frozen=True)
class Beside:
    """The files to copy, by name in the output. left: (model, file, reason). lent: (file, model) for those of another.

    A file's part is FILE#KEY.
    """

    files: tuple[tuple[str, Path], ...]
    left: tuple[tuple[str, str, str], ...]
    lent: tuple[tuple[str, str], ...]


def gather_files(models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Beside:
    """The files beside the weights. Raises PlanError with all files that a config names and no model has."""
    sidecars = sidecars_of(models[template])
    files, reasons, lent = dict(sidecars.files), dict(sidecars.left), dict[str, str]()
    problems = dict(_lacking_modules(models[template], files, reasons))
    while waiting := {n: by for n, by in _references(files).items() if n not in files and n not in problems}:
        for name, by in waiting.items():
            lenders = (
                {} if name in reasons or not name.endswith(".py") else _find_lenders(name, models, labels, template)
            )
            contents = {read_bytes(path) for path in lenders.values()}
            if len(contents) == 1:
                lent[name], files[name] = next(iter(lenders.items()))
                continue
            why = f"was left behind: {reasons[name]}" if name in reasons else "is not there"
            others = f"; {' and '.join(lenders)} have different ones" if contents else ""
            problems[name] = (
                f"{by} of {labels[template]} names {name}, which {why}{others}; put the file into its folder"
            )
    if problems:
        raise PlanError(several("files that the model needs are missing", list(problems.values())))
    left = [(labels[template], name, why) for name, why in sidecars.left]
    for label, model in zip(labels, models, strict=True):
        for file in model.files:
            left += [(label, f"{file.name}#{key}", f"beside the tensors under {file.address}") for key in file.beside]
    return Beside(tuple(sorted(files.items())), tuple(dict.fromkeys(left)), tuple(lent.items()))


def _find_lenders(name: str, models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> dict[str, Path]:
    """The file in the folders of the other models, by their labels."""
    lenders = {}
    for i, (label, model) in enumerate(zip(labels, models, strict=True)):
        if i != template and model.snapshot is not None and name in model.snapshot.sizes:
            model.snapshot.fetch([name])
        path = model.path / name
        if i != template and path.is_file() and not examine(path, model.path):
            lenders[label] = path
    return lenders


def _references(files: Mapping[str, Path]) -> dict[str, str]:
    """The files that the configs name, and those that the named code imports; and for each the file that names it."""
    found = dict[str, str]()
    for config in (name for name in CONFIGS if name in files):
        data = read_json(files[config])
        for name in _named_code(data) if isinstance(data, dict) else ():
            found.setdefault(name, config)
        for name in _named_files(data) if isinstance(data, dict) and config == TOKENIZER else ():
            found.setdefault(name, config)
    waiting = list(found)
    while waiting:
        code = waiting.pop()
        if code.endswith(".py") and code in files:
            imported = [f"{name.decode()}.py" for name in IMPORT.findall(read_bytes(files[code]))]
            waiting += [name for name in imported if name not in found]
            found = dict.fromkeys(imported, code) | found
    return found


def _named_code(config: Mapping[str, Any]) -> Iterator[str]:
    """The files of code that a config names; code in another repository is written as REPOSITORY--FILE.CLASS."""
    auto, pipelines = config.get("auto_map"), config.get("custom_pipelines")
    classes: list[Any] = list(auto.values()) if isinstance(auto, dict) else []
    classes += (
        [entry.get("impl") for entry in pipelines.values() if isinstance(entry, dict)]
        if isinstance(pipelines, dict)
        else []
    )
    for one in classes:
        for name in one if isinstance(one, list) else [one]:
            if isinstance(name, str) and "--" not in name and re.fullmatch(r"\w+\.\w+", name):
                yield f"{name.partition('.')[0]}.py"


def _named_files(config: Mapping[str, Any]) -> Iterator[str]:
    """The files that the config of a tokenizer names; paths of the machine that saved it do not count."""
    versions = config.get("fast_tokenizer_files")
    named = [value for key, value in config.items() if key.endswith("_file") and key != RECORDED]
    for name in [*named, *(versions if isinstance(versions, list) else [])]:
        if isinstance(name, str) and re.fullmatch(r"[^/\\]+", name):
            yield name


def _lacking_modules(
    template: Checkpoint, files: Mapping[str, Path], reasons: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The modules in modules.json that the output would lack, or whose weights it would, and why."""
    merged = [file.path.relative_to(template.path).as_posix() for file in template.files if MODULES in files]
    for module, kind in read_modules(files[MODULES].parent).items() if MODULES in files else ():
        copied = any(name.startswith(f"{module}/") for name in (*files, *merged))
        weighed = any(name.startswith(f"{module}/") for name in merged)
        left = {name: why for name, why in reasons.items() if name == module or name.startswith(f"{module}/")}
        others = [name for name, why in left.items() if why == OTHER_WEIGHTS]
        if not copied and not kind.endswith(WITHOUT_FILES):
            why = "".join(f"; {name} was left behind: {why}" for name, why in list(left.items())[:1])
            yield module, f"{MODULES} lists {module}, which has no files{why}; put that folder beside it"
        elif others and not weighed:
            yield (
                module,
                f"{MODULES} lists {module}, whose weights, {others[0]}, cannot be read; save them as safetensors",
            )
