"""Records of published data sets, in the layout of our facts files: CounterFact, MQuAKE, zsRE, EasyEdit, KnowEdit.

The facts are read, and the statements that shall stay true. Consequences of a fact (portability, questions over several
hops) are not: an edit does not claim them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OWN = ("prompt", "subject", "target_new", "target_true", "question", "join")
OWN_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "same_subject")
# The names in EasyEdit's and KnowEdit's records by ours, in the order in which they count.
NAMES = {
    "subject": ("subject", "concept"),
    "prompt": ("prompt", "text"),
    "target_new": ("target_new", "labels"),
    "target_true": ("target_true", "ground_truth"),
}
PARAPHRASES = ("paraphrase_prompts", "rephrase_prompt", "rephrase_prompts", "rephrase", "paraphrase")
EASYEDIT = ("ground_truth", "locality", "locality_prompt", "portability", "rephrase_prompt", "rephrase", "concept")
ZSRE_TASK = "nq question: "  # T5's name of the task, which the unrelated questions of zsRE begin with
NO_ANSWER = ("", "<|endoftext|>")  # in place of an unknown answer


@dataclass(frozen=True, slots=True)
class Record:
    """The facts of a record, each as a mapping in our layout, and its statements about other subjects."""

    facts: tuple[Mapping[str, Any], ...]
    others: tuple[tuple[str, str], ...] = ()


def read_record(raw: object) -> Record | None:
    """The record in our layout; None if it has none of the published ones."""
    if not isinstance(raw, Mapping):
        return None
    if "requested_rewrite" in raw:
        return _from_counterfact(raw)
    if "src" in raw:
        return _from_zsre(raw)
    return _from_easyedit(raw) if any(name in raw for name in EASYEDIT) else None


def _from_counterfact(raw: Mapping[str, Any]) -> Record:
    """CounterFact: one rewrite with prompts to judge it by. MQuAKE: several in a list, each with its question."""
    rewrites = raw["requested_rewrite"]
    lists = {name: raw[name] for name in OWN_LISTS if name in raw}
    facts = [
        {**{name: _text(each.get(name)) for name in OWN if each.get(name) is not None}, **lists}
        for each in (rewrites if isinstance(rewrites, list) else [rewrites])
        if isinstance(each, Mapping)
    ]
    return Record(tuple(facts) or ({},))


def _from_zsre(raw: Mapping[str, Any]) -> Record:
    """zsRE as MEND published it. The fact to teach is `alt`, as in MEND and EasyEdit, else the first answer."""
    answer, taught = _text(raw.get("answers")), _text(raw.get("alt"))
    fact = {
        "prompt": raw["src"],
        "subject": raw.get("subject"),
        "target_new": taught or answer,
        "target_true": answer if taught and answer != taught else None,
        "paraphrase_prompts": _list(raw.get("rephrase")),
    }
    unrelated, right = _text(raw.get("loc")), _text(raw.get("loc_ans"))
    if not all(isinstance(text, str) and text.strip() for text in (unrelated, right)):
        return Record((fact,))
    question = unrelated.removeprefix(ZSRE_TASK)
    mark = "?" if question != unrelated and not question.endswith("?") else ""  # as the code of ROME and MEMIT adds it
    return Record((fact,), ((question + mark, right),))


def _from_easyedit(raw: Mapping[str, Any]) -> Record:
    """EasyEdit and KnowEdit. Prompts hold their subject; answers are texts, or lists: their first counts."""
    fact: dict[str, Any] = {
        ours: next((_text(raw[name]) for name in names if raw.get(name) is not None), None)
        for ours, names in NAMES.items()
    }
    if fact["target_true"] in (*NO_ANSWER, fact["target_new"]):
        fact["target_true"] = None
    fact |= {name: raw[name] for name in ("question", "join", *OWN_LISTS) if name in raw}
    fact["paraphrase_prompts"] = [text for name in PARAPHRASES for text in _list(raw.get(name))]
    statements = [pair for pair in _localities(raw) if pair[0].strip() and pair[1].strip()]
    about = [pair for pair in statements if isinstance(fact["subject"], str) and fact["subject"] in pair[0]]
    same = [{"prompt": prompt, "target": target} for prompt, target in about]
    fact["same_subject"] = [*_list(fact.get("same_subject")), *same]
    return Record((fact,), tuple(pair for pair in statements if pair not in about))


def _localities(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The statements under `locality` and beside it, in each of the shapes that the data sets give them."""
    locality = raw.get("locality")
    groups = list(locality.values()) if isinstance(locality, Mapping) else []
    groups.append({"prompt": raw.get("locality_prompt"), "ground_truth": raw.get("locality_ground_truth")})
    for entry in (each for group in groups for each in (group if isinstance(group, list) else [group])):
        if not isinstance(entry, Mapping):
            continue
        prompts, answers = entry.get("prompt"), entry.get("ground_truth")
        pairs = [(prompts, answers)]
        if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers):
            pairs = list(zip(prompts, answers, strict=True))
        for prompt, answer in ((_text(one), _text(other)) for one, other in pairs):
            if isinstance(prompt, str) and isinstance(answer, str):
                yield prompt, answer


def _text(value: Any) -> Any:
    """The text itself, the `str` of a mapping, or the first of a list; anything else unchanged."""
    if isinstance(value, Mapping):
        return value.get("str")
    return (_text(value[0]) if value else None) if isinstance(value, list) else value


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
