"""The facts file: facts to teach a model, and prompts to judge it by. YAML, JSON, or records of published data sets.

A prompt has {} in place of its subject. One message lists all problems of a file with their places in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.artifacts.records import read_record
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.errors import FormatError, PlanError, did_you_mean
from mergekit_lfm.store.files import parse_json, read_text
from mergekit_lfm.store.yaml import read_yaml

BLANK = "{}"  # in place of the subject in a prompt


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact to teach: after `prompt` with the subject in place of {} the model shall say target_new.

    target_true: the model's answer before. paraphrase_prompts: other texts that the model shall continue likewise;
    neighborhood_prompts: texts about other subjects, for which target_true stays true; same_subject: statements that
    stay true of the subject. Names and roles are CounterFact's (Meng et al. 2022, arXiv 2202.05262, section 3.4).
    question: the prompt as a question. join: the text between a prompt and a target, as of a `Statement`.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    same_subject: tuple[Statement, ...] = ()
    question: str | None = None
    join: str | None = None

    @property
    def text(self) -> str:
        """The prompt with its subject filled in, without blanks at its end."""
        return self.prompt.replace(BLANK, self.subject).rstrip()

    @property
    def continuation(self) -> str:
        """The rest of the text, after `text`, that the model shall say."""
        return self.complete(self.target_new).parts[1]

    def complete(self, target: str, prompt: str | None = None) -> Statement:
        """The statement of a target after the fact's own prompt, or after another one."""
        return Statement(self.prompt.replace(BLANK, self.subject) if prompt is None else prompt, target, self.join)


@dataclass(frozen=True, slots=True)
class FactsFile:
    """The facts to teach, and `unedited`, unrelated statements that shall stay true."""

    facts: tuple[Fact, ...]
    unedited: tuple[Statement, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The file's contents without empty fields. JSON-able."""
        whole = _without_empty(
            {"facts": [asdict(x) for x in self.facts], "unedited": [asdict(x) for x in self.unedited]}
        )
        data: dict[str, Any] = json.loads(json.dumps(whole))
        return data


def _without_empty(data: Any) -> Any:
    """The data less entries of mappings that hold nothing; an empty text is something."""
    if isinstance(data, Mapping):
        return {
            key: _without_empty(value) for key, value in data.items() if value is not None and value not in ((), [])
        }
    return [_without_empty(entry) for entry in data] if isinstance(data, list | tuple) else data


def read_facts_file(path: str | os.PathLike[str]) -> FactsFile:
    """The facts in a file. Raises PlanError with a list of all its problems."""
    file = Path(path)
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanError(f"{file}: cannot be read: {reason}; expected a facts file in YAML or JSON") from error
    if file.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)  # splitlines would cut at U+2028, which JSON may hold
        data: object = [_json(line, f"{file}: line {number}") for number, line in lines if line.strip()]
    else:
        data = _json(text, str(file)) if file.suffix == ".json" else read_yaml(text, str(file))
    return _read(data, str(file))


def as_facts(given: str | os.PathLike[str] | FactsFile | Mapping[str, Any] | Sequence[Any]) -> FactsFile:
    """Facts from a file, its data, or a list of facts or mappings. Raises PlanError with a list of all problems."""
    if isinstance(given, FactsFile):
        return given
    if isinstance(given, str | os.PathLike):
        return read_facts_file(given)
    if not isinstance(given, Mapping):
        facts = tuple(fact for fact in given if isinstance(fact, Fact))
        given = FactsFile(facts).as_data() if len(facts) == len(given) else given
    return _read(given, "facts")


def _json(text: str, label: str) -> object:
    try:
        return parse_json(text, label)
    except FormatError as error:
        raise PlanError(str(error)) from None


def _read(data: object, label: str) -> FactsFile:
    problems: list[str] = []
    whole = {"facts": data} if isinstance(data, list | tuple) else data
    if not isinstance(whole, Mapping) or not isinstance(whole.get("facts"), list | tuple) or not whole["facts"]:
        raise PlanError(
            f"{label}: found {data!r:.60}, expected `facts`, a list of mappings with {', '.join(REQUIRED_KEYS)}"
        )
    _refuse_unknown(whole, ("facts", "unedited", "join"), "", problems)
    join = _join(whole.get("join"), "join", problems)
    facts, others = dict[str, tuple[str, Fact]](), list[Statement]()
    for i, raw in enumerate(whole["facts"]):
        record, at = read_record(raw), f"facts[{i}]"
        others += [] if record is None else [Statement(*pair, join) for pair in record.others]
        for each in (raw,) if record is None else record.facts:
            fact = _fact(each, at, join, problems)
            if fact is not None:
                first, known = facts.setdefault(fact.text, (at, fact))
                if known is not fact and (record is None or known != fact):  # data sets repeat facts
                    conflict = "is given twice" if known.target_new == fact.target_new else "has two targets"
                    problems.append(f"{at}: {fact.text!r} {conflict}, here and in {first}; keep one of them")
    unedited = (*_statements(whole.get("unedited"), "unedited", join, problems), *others)
    if problems:
        raise PlanError(f"{label}: {_count_problems(problems)}" + "\n  ".join(problems))
    return FactsFile(tuple(fact for _, fact in facts.values()), tuple(dict.fromkeys(unedited)))


def _count_problems(problems: Sequence[str]) -> str:
    return f"{len(problems)} problems\n  " if len(problems) > 1 else ""


REQUIRED_KEYS = ("prompt", "subject", "target_new")


def _fact(raw: object, at: str, join: str | None, problems: list[str]) -> Fact | None:
    """The fact in a mapping, None if it has problems. join: that of the file."""
    if not isinstance(raw, Mapping):
        problems.append(f"{at}: found {raw!r:.60}, expected a mapping with {', '.join(REQUIRED_KEYS)}")
        return None
    before = len(problems)
    _refuse_unknown(raw, Fact.__slots__, f"{at}.", problems)
    for name in (*REQUIRED_KEYS, "target_true", "question"):
        value = raw.get(name)
        if value is None and name not in REQUIRED_KEYS:
            continue
        if not isinstance(value, str) or not value.strip():
            shown = "nothing" if value is None else repr(value)
            hint = "; quote it, as YAML reads another type" if isinstance(value, bool | int | float) else ""
            problems.append(f"{at}.{name}: found {shown}, expected text{hint}")
    join = _join(raw.get("join"), f"{at}.join", problems, join)
    lists: dict[str, Any] = {name: _texts(raw.get(name), f"{at}.{name}", problems) for name in LISTS}
    same_subject = _statements(raw.get("same_subject"), f"{at}.same_subject", join, problems)
    if len(problems) > before:
        return None
    subject, true = raw["subject"].strip(), raw.get("target_true")
    prompt = _open_blank(raw["prompt"], subject)
    if prompt.count(BLANK) != 1:
        problems.append(
            f"{at}.prompt: found {raw['prompt']!r}, expected {BLANK} exactly once, in place of the subject, or the "
            f"subject {subject!r} itself"
        )
        return None
    target_new, target_true = raw["target_new"].rstrip(), true and true.rstrip()
    question = raw.get("question")
    return Fact(
        prompt, subject, target_new, target_true, same_subject=same_subject, question=question, join=join, **lists
    )


LISTS = ("paraphrase_prompts", "neighborhood_prompts")


def _open_blank(prompt: str, subject: str) -> str:
    """The prompt with {} in place of the first mention of its subject, of the whole word if there is one."""
    if BLANK in prompt:
        return prompt
    whole_word = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    start = prompt.find(subject) if whole_word is None else whole_word.start()
    return prompt if start < 0 else f"{prompt[:start]}{BLANK}{prompt[start + len(subject) :]}"


def _join(raw: object, at: str, problems: list[str], default: str | None = None) -> str | None:
    """The text between prompts and targets."""
    if raw is None or isinstance(raw, str):
        return default if raw is None else raw
    problems.append(f'{at}: found {raw!r:.60}, expected the text between a prompt and its target, such as ""')
    return None


def _refuse_unknown(raw: Mapping[str, Any], known: Sequence[str], at: str, problems: list[str]) -> None:
    problems += [f"{at}{key}: unknown key, {did_you_mean(key, known)}" for key in raw if key not in known]


def _texts(raw: object, at: str, problems: list[str]) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple) or not all(isinstance(text, str) and text.strip() for text in raw):
        problems.append(f"{at}: found {raw!r:.60}, expected a list of texts")
        return ()
    return tuple(raw)


def _statements(raw: object, at: str, join: str | None, problems: list[str]) -> tuple[Statement, ...]:
    """The statements in a list. join: that of the fact or the file."""
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple):
        problems.append(f"{at}: found {raw!r:.60}, expected a list of {{prompt, target}}")
        return ()
    statements = []
    for i, entry in enumerate(raw):
        complete = isinstance(entry, Mapping) and set(entry) - {"join"} == {"prompt", "target"}
        if complete and all(isinstance(entry[key], str) and entry[key].strip() for key in ("prompt", "target")):
            own = _join(entry.get("join"), f"{at}[{i}].join", problems, join)
            statements.append(Statement(entry["prompt"], entry["target"].rstrip(), own))
        else:
            problems.append(f"{at}[{i}]: found {entry!r:.60}, expected {{prompt, target}}, both text")
    return tuple(statements)
