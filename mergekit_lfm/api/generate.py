"""`generate_texts`: from a language model, and prompts if there are some, to a data file of texts that it writes."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import xxhash

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.generate_batches import Pace, Text, write_batch
from mergekit_lfm.api.generate_plans import PlannedTexts, plan_texts
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.stats import set_threads
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.file_request import check_lock_beside, lock_beside, read_lock_beside
from mergekit_lfm.output.unfinished_lines import UnfinishedLines, drop_unfinished
from mergekit_lfm.recipe.generate_recipe import JOB, MOST_TOKENS, GenerateRecipe
from mergekit_lfm.runtime.load import load_reader, tokenizer_for_texts
from mergekit_lfm.store.durable import replace_file, sync_folder
from mergekit_lfm.train.openings import Row, encode_openings
from mergekit_lfm.version import versions


@dataclass(frozen=True, slots=True)
class Generated:
    """The texts in the file. tokens: in all of them, without ends. ended: texts that the model ended by itself.

    blank: texts without a word, which are left out.
    """

    texts: int
    prompts: int
    tokens: int
    ended: int
    blank: int


def generate_texts(
    model: StrPath,
    data: StrPath | None,
    out: StrPath,
    *,
    task: str = "lm",
    count: int = 1,
    max_new_tokens: int = MOST_TOKENS,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    window: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Generated]:
    """Let a language model write texts, and keep them as a data file, for `tune` above all.

    model: a folder, a name on the Hub, or MODEL+ADAPTER. data: a .jsonl file with a prompt, or messages, on each line;
    None for texts that the model begins itself, at its start token. out: the .jsonl file: lines {"prompt",
    "completion"}, {"messages"} with the assistant's turn, or {"text"}. task: "lm", or "seq2seq" for an encoder with a
    decoder. count: texts for each prompt, or in all without prompts. max_new_tokens: of a text; window: of a prompt
    with its text, by default as many as the model takes. temperature: 0 takes the most likely token each time. top_k,
    top_p: only the most likely tokens, as of `Sampling`. threads: how many torch uses.

    Each text has random numbers of its own: they depend on the seed and the numbers of the prompt and the text alone. A
    run that was killed goes on from OUT.partial to the same bytes. If `out` holds the result of the same request
    already, which OUT.lock.json says, nothing is done. The outcome's digest is that of the request. Raises PlanError
    for settings that do not fit, FormatError for a file without prompts, or with too long ones, ImportError without
    transformers.
    """
    settings = {name: value for name, value in locals().items() if name in GenerateRecipe.model_fields}
    paths = {key: os.fspath(x) for key in ("model", "data") if isinstance(x := settings[key], os.PathLike)}
    recipe = GenerateRecipe.parse({"job": JOB, **settings, **paths})
    planned = plan_texts(recipe, expand(out), device=device)
    return write_planned(planned, threads=threads, overwrite=overwrite, progress=progress)


def write_planned(
    planned: PlannedTexts, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Generated]:
    """Write planned texts; as `generate_texts` does."""
    started, request, out = time.monotonic(), planned.request, planned.out
    there = request.is_answered(out, overwrite=overwrite)
    if there:
        generated = Generated(**read_lock_beside(out, JOB)["result"])
        drop_unfinished(out)
    else:
        check_lock_beside(out, JOB)
        with set_threads(threads):
            generated = _write(planned, progress)
    cut = generated.texts - generated.ended
    findings = [f"{generated.blank:,} texts are blank and left out"] if generated.blank else []
    if cut and planned.recipe.data is not None:
        found = f"{cut:,} of {generated.texts:,} texts were cut before their end, and `tune` would teach to end there"
        findings.append(f"{found}; raise max_new_tokens, or the window")
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(out, generated, request.request.digest, there, warnings, time.monotonic() - started)


def _write(planned: PlannedTexts, progress: Progress) -> Generated:
    """Write the texts, go on where an earlier run was interrupted, and publish them with their lock."""
    recipe, request = planned.recipe, planned.request.request
    tokenizer, positions = load_reader(planned.model.source, recipe.task)
    tokenizer = tokenizer_for_texts(tokenizer)
    how: dict[str, Any] = {"window": recipe.window, "positions": positions}
    rows = encode_openings(recipe.data_file, planned.openings, tokenizer, recipe.task, **how)
    batches = _batches(rows, recipe)
    with UnfinishedLines(planned.out, request.digest) as unfinished:
        _write_batches(planned, rows, batches, unfinished, progress)
        texts = dict(zip(chain.from_iterable(batches), chain.from_iterable(unfinished.parts), strict=True))
    request.check_unchanged()
    lines, kept = list[str](), list[Any]()
    for number, copy in sorted(texts):
        if (text := texts[number, copy])["text"].strip():
            lines.append(json.dumps(planned.openings[number].complete(text["text"]), ensure_ascii=False) + "\n")
            kept.append(text)
    if not kept:
        raise PlanError(f"{recipe.model} ends every text before its first word; give other prompts, or another model")
    tokens, ended = sum(text["tokens"] for text in kept), sum(text["ended"] for text in kept)
    generated = Generated(len(kept), len(rows) if recipe.data else 0, tokens, ended, len(texts) - len(kept))
    _publish(planned, "".join(lines).encode(), generated)
    return generated


def _publish(planned: PlannedTexts, content: bytes, generated: Generated) -> None:
    """Write the lock, then the file that it is of, and remove the parts."""
    request = planned.request.request
    lock = {"job": JOB, "request": request.digest, "recipe": request.public, "versions": versions("torch")}
    lock |= {"result": asdict(generated), "content": xxhash.xxh3_128_hexdigest(content)}
    replace_file(lock_beside(planned.out), (json.dumps(lock, indent=2) + "\n").encode())
    replace_file(planned.out, content)
    sync_folder(planned.out.parent)
    drop_unfinished(planned.out)


def _batches(rows: Sequence[Row], recipe: GenerateRecipe) -> list[list[Text]]:
    """The texts that are written at once: of equally long prompts, so that none is padded, in a fixed order."""
    alike = defaultdict[tuple[int, int], list[Text]](list)
    for number, row in enumerate(rows):
        room = recipe.max_new_tokens if row.room is None else min(row.room, recipe.max_new_tokens)
        alike[len(row.tokens), room] += [(number, copy) for copy in range(recipe.count)]
    size = recipe.batch_size
    return [own[i : i + size] for _, own in sorted(alike.items()) for i in range(0, len(own), size)]


def _write_batches(
    planned: PlannedTexts,
    rows: Sequence[Row],
    batches: Sequence[Sequence[Text]],
    unfinished: UnfinishedLines,
    progress: Progress,
) -> None:
    """Write the batches that are not there yet."""
    recipe, first = planned.recipe, len(unfinished.parts)
    if first == len(batches):
        return
    loaded = planned.model.load(recipe.task, planned.device, recipe.dtype)
    whole, done = sum(map(len, batches)), sum(map(len, batches[:first]))
    with progress.by_step(" texts", "writing") as report:
        pace = Pace(report, whole, done)
        for batch in batches[first:]:
            unfinished.add(write_batch(loaded, recipe, planned.openings, rows, batch, pace))
            pace.tell(len(batch), 0)
