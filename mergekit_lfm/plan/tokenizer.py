"""The tokenizer's files in the output, and its chat template: copied where nothing changes, else changed as JSON.

New tokens become added tokens, with the settings that the first model has for them. Files of the tokenizer come from
the model that the recipe names; the special ids in the configs then become those of the same tokens in its tokenizer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.beside import TOKENIZER, Beside, gather_files
from mergekit_lfm.plan.tokens import TokenTable
from mergekit_lfm.plan.vocabulary import Vocabulary
from mergekit_lfm.recipe.chat import AUTO, TEMPLATES
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import parse_json, read_bytes, read_json, read_small_text
from mergekit_lfm.store.tokens import ADDED, WHOLE, Tokens

CHAT, OLD_CHAT = "chat_template.jinja", "chat_template.json"
OF_TOKENIZER = re.compile(
    r"^(tokenizer(_config)?\.json|tokenizer\.model.*|tokenization_\w+\.py|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja|"
    r"additional_chat_templates/.*)$"
)
SPECIALS, DECODER = "special_tokens_map.json", "added_tokens_decoder"
WITH_IDS = ("config.json", "generation_config.json")
ID_KEY = re.compile(r"_token_(ids?|index)$|^(begin_)?suppress_tokens$|^bad_words_ids$")
SETTINGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Files:
    """The files beside the weights, and the bytes of those that the plan itself makes, by name."""

    beside: Beside
    made: Mapping[str, bytes] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def make_files(
    chat_template: str | None,
    vocabulary: Vocabulary,
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    template: int,
) -> Files:
    """The files with the vocabulary's tokenizer and the chat template, None for the tokenizer's own.

    Raises PlanError as `gather_files` does, and if a special id of a config is that of a token that the output lacks.
    """
    beside, table = gather_files(models, labels, template), vocabulary.table
    files = Files(beside, {}, vocabulary.notices, vocabulary.warnings)
    if table is not None and table.donor != template:
        files = _take_tokenizer(files, table, models, labels)
        files = replace(files, made={**files.made, **dict(_translate_ids(files, table))})
    if table is not None:
        made, warnings = _change_tokenizer(files, table)
        files = replace(files, made={**files.made, **made}, warnings=(*files.warnings, *warnings))
    if chat_template is not None:
        files = _set_template(files, chat_template, models, labels, labels[template])
    return files


def _take_tokenizer(files: Files, table: TokenTable, models: Sequence[Checkpoint], labels: Sequence[str]) -> Files:
    """The files with the donor's tokenizer in place of the template's."""
    donor = gather_files(models, labels, table.donor)
    kept = [(name, path) for name, path in files.beside.files if not OF_TOKENIZER.search(name)]
    taken = [(name, path) for name, path in donor.files if OF_TOKENIZER.search(name)]
    text = f"of {labels[table.donor]}: {', '.join(name for name, _ in taken)}"
    return replace(
        files, beside=replace(files.beside, files=tuple(sorted([*kept, *taken]))), notices=(*files.notices, text)
    )


def _translate_ids(files: Files, table: TokenTable) -> Iterator[tuple[str, bytes]]:
    """The configs with the ids of the same tokens in the output's tokenizer."""
    theirs = table.tokens[table.template].by_id
    known = {text: number for number, text in reversed(table.by_id.items())}
    problems = list[str]()

    def translate(number: Any, place: str) -> Any:
        if isinstance(number, list):
            return [translate(each, place) for each in number]
        text = theirs.get(number) if isinstance(number, int) else None
        if text is None and number in table.by_id:
            problems.append(f"{place} is {number}, for which {table.labels[table.template]} has no token")
        if text is not None and text not in known:
            lacking = table.labels[table.donor]
            problems.append(f"{place} is {number}, the token {text!r}, which the tokenizer of {lacking} lacks")
        return number if text is None else known.get(text, number)

    paths = dict(files.beside.files)
    for name in (name for name in WITH_IDS if name in paths):
        before = read_json(paths[name])
        after = _map_ids(before, translate, name)
        if after != before:
            yield name, _encode(after)
    if problems:
        cure = "\nAdd the tokens to the recipe's `tokenizer: {tokens: ...}`, or take `source: union`"
        raise PlanError(several("special tokens are missing", problems) + cure)


def _map_ids(data: Any, translate: Callable[[Any, str], Any], place: str) -> Any:
    """A config, and all configs in it, with other ids."""
    if not isinstance(data, dict):
        return data
    return {
        key: translate(value, f"{key} of {place}") if ID_KEY.search(key) else _map_ids(value, translate, place)
        for key, value in data.items()
    }


def _change_tokenizer(files: Files, table: TokenTable) -> tuple[dict[str, bytes], list[str]]:
    """The files of the tokenizer that change, and warnings about tokens for which models have other settings."""
    donor, new = table.tokens[table.donor], table.new
    gone = {number: text for number, text in donor.by_id.items() if number not in table.own[table.donor]}
    lost = set(gone.values()) - set(table.by_id.values())
    if not new and not gone:
        return {}, []
    entries, warnings = _entries(table, new)
    added = [entry for entry in _added(donor) if entry.get("id") not in gone]
    added += [{"id": number, **entry} for number, entry in entries.items()]
    made = {WHOLE: _encode({**_without(donor.data, gone), "added_tokens": added})}
    for name, path in files.beside.files:
        before = read_json(path) if name in (TOKENIZER, SPECIALS, ADDED) else None
        if not isinstance(before, dict):
            continue
        after = _without_specials(before, lost)
        if name == ADDED:
            after = {text: number for text, number in before.items() if number not in gone}
            after |= {text: number for number, text in new.items()}
        elif isinstance(decoder := before.get(DECODER), dict):
            kept = {number: entry for number, entry in decoder.items() if number not in map(str, gone)}
            after[DECODER] = {**kept, **{str(number): entry for number, entry in entries.items()}}
        if after != before:
            made[name] = _encode(after)
    return made, warnings


def _added(tokens: Tokens) -> list[dict[str, Any]]:
    """The added tokens in a tokenizer.json."""
    return [entry for entry in tokens.data.get("added_tokens") or [] if isinstance(entry, dict)]


def _entries(table: TokenTable, new: Mapping[int, str]) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The settings of new tokens by ids: those of the first model that has it as an added token; and warnings."""
    stated: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for label, tokens in zip(table.labels, table.tokens, strict=True):
        for entry in _added(tokens):
            settings = {key: entry.get(key, value) for key, value in SETTINGS.items()}
            stated.setdefault(str(entry.get("content")), []).append((label, settings))
    entries, warnings = dict[int, dict[str, Any]](), list[str]()
    for number, text in new.items():
        (first, settings), *others = stated.get(text, [("", SETTINGS)])
        entries[number] = {"content": text, **settings}
        if other := [label for label, theirs in others if theirs != settings]:
            those = f"those of {first} are taken"
            warnings.append(f"the added token {text!r} has other settings in {', '.join(other)}: {those}")
    return entries, warnings


def _without(data: dict[str, Any], gone: Collection[int]) -> dict[str, Any]:
    """A tokenizer.json without some ids of its model's vocabulary, and without the merges that make these."""
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not gone:
        return data
    if isinstance(vocabulary, list):
        return {**data, "model": {**model, "vocab": vocabulary[: min([*gone, len(vocabulary)])]}}
    if not isinstance(vocabulary, dict):
        return data
    kept = {text: number for text, number in vocabulary.items() if number not in gone}
    model = {**model, "vocab": kept}
    if isinstance(merges := model.get("merges"), list):
        model["merges"] = [merge for merge in merges if {*_pair(merge), "".join(_pair(merge))} <= kept.keys()]
    return {**data, "model": model}


def _pair(merge: Any) -> list[str]:
    """The two pieces of a merge, which older files write as one text."""
    return [*map(str, merge)] if isinstance(merge, list) else str(merge).split(" ")


def _without_specials(config: dict[str, Any], lost: set[str]) -> dict[str, Any]:
    """A config of a tokenizer without roles for tokens that are gone."""

    def text_of(value: Any) -> str:
        return str(value.get("content") if isinstance(value, dict) else value)

    kept = dict[str, Any]()
    for key, value in config.items():
        if isinstance(value, list) and key.endswith("special_tokens"):
            kept[key] = [each for each in value if text_of(each) not in lost]
        elif not (key.endswith("_token") and text_of(value) in lost):
            kept[key] = value
    return kept


def _set_template(files: Files, choice: str, models: Sequence[Checkpoint], labels: Sequence[str], first: str) -> Files:
    """The files with a chat template of its own file."""
    notices = files.notices
    if choice == AUTO:
        text, why = _most_frequent([_template_of(model) for model in models], labels)
        notices += (why,)
        if text is None:
            return replace(files, notices=notices)
    else:
        text = TEMPLATES.get(choice, choice)
    made, paths = dict(files.made), dict(files.beside.files)
    made[CHAT] = text.encode()
    if TOKENIZER in paths:
        raw = made.get(TOKENIZER) or read_bytes(paths[TOKENIZER])
        config = parse_json(raw, str(paths[TOKENIZER]))
        if isinstance(config, dict) and "chat_template" in config:
            made |= _named_templates(config.pop("chat_template"))
            made[TOKENIZER] = _encode(config)
    left = files.beside.left
    if OLD_CHAT in paths:
        left += ((first, OLD_CHAT, "the recipe's chat_template takes its place"),)
    others = tuple((name, path) for name, path in files.beside.files if name != OLD_CHAT)
    return replace(files, beside=replace(files.beside, files=others, left=left), made=made, notices=notices)


def _named_templates(templates: Any) -> Iterator[tuple[str, bytes]]:
    """The templates besides the default one of a list of them, as files where transformers looks for them."""
    for entry in (each for each in templates if isinstance(each, dict)) if isinstance(templates, list) else ():
        name, text = entry.get("name"), entry.get("template")
        if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) and name != "default" and isinstance(text, str):
            yield f"additional_chat_templates/{name}.jinja", text.encode()


def _most_frequent(templates: Sequence[str | None], labels: Sequence[str]) -> tuple[str | None, str]:
    """The template that most models have, of several the first model's; and a sentence about it."""
    counts = Counter(text for text in templates if text is not None)
    if not counts:
        return None, "chat_template auto: no model has one"
    most = max(counts.values())
    text = next(text for text in templates if text is not None and counts[text] == most)
    ties = sum(count == most for count in counts.values())
    first = f"; {ties - 1} more as often, the first in the recipe's order is taken" if ties > 1 else ""
    return (
        text,
        f"chat_template auto: that of {labels[templates.index(text)]}, in {most} of {len(templates)} models{first}",
    )


def _template_of(model: Checkpoint) -> str | None:
    """A model's chat template, stripped."""
    if model.snapshot is not None:
        model.snapshot.fetch([name for name in (CHAT, TOKENIZER, OLD_CHAT) if name in model.snapshot.sizes])
    if (path := model.path / CHAT).is_file():
        return read_small_text(path).strip()
    for path in (path for name in (TOKENIZER, OLD_CHAT) if (path := model.path / name).is_file()):
        data = read_json(path)
        text = data.get("chat_template") if isinstance(data, dict) else None
        if isinstance(text, list):
            text = next((e.get("template") for e in text if isinstance(e, dict) and e.get("name") == "default"), None)
        if isinstance(text, str):
            return text.strip()
    return None


def _encode(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # lone surrogates
