"""The facts file: facts to teach a model, and prompts to judge it by. YAML, JSON, or CounterFact's records.

A prompt has {} in place of its subject. One message lists all problems of a file with their places in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError, PlanError, did_you_mean
from mergekit_lfm.store.files import parse_json, read_text
from mergekit_lfm.store.yaml import read_yaml

BLANK = "{}"  # in place of the subject in a prompt


@dataclass(frozen=True, slots=True)
class Statement:
    """A text and its continuation."""

    prompt: str
    target: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact to teach: after `prompt` with the subject in place of {} the model shall say target_new.

    target_true: the model's answer before. paraphrase_prompts: other texts that the model shall continue likewise;
    neighborhood_prompts: texts about other subjects, for which target_true stays true; same_subject: statements that
    stay true of the subject. Names and roles are CounterFact's (Meng et al. 2022, arXiv 2202.05262, section 3.4).
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    same_subject: tuple[Statement, ...] = ()

    @property
    def text(self) -> str:
        """The prompt with its subject filled in."""
        return self.prompt.replace(BLANK, self.subject)


@dataclass(frozen=True, slots=True)
class FactsFile:
    """The facts to teach, and `unedited`, unrelated statements that shall stay true."""

    facts: tuple[Fact, ...]
    unedited: tuple[Statement, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The file's contents without empty fields. JSON-able."""
        facts = [{key: value for key, value in asdict(fact).items() if value not in (None, ())} for fact in self.facts]
        unedited = [asdict(statement) for statement in self.unedited]
        data: dict[str, Any] = json.loads(json.dumps({"facts": facts, **({"unedited": unedited} if unedited else {})}))
        return data


def read_facts_file(path: str | os.PathLike[str]) -> FactsFile:
    """The facts in a file. Raises PlanError with a list of all its problems."""
    file = Path(path)
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanError(f"{file}: cannot be read: {reason}; expected a facts file in YAML or JSON") from error
    if file.suffix == ".jsonl":
        data: object = [_json(line, f"{file}: line {i + 1}") for i, line in enumerate(text.splitlines()) if line]
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
    _refuse_unknown(whole, ("facts", "unedited"), "", problems)
    facts = [_fact(raw, f"facts[{i}]", problems) for i, raw in enumerate(whole["facts"])]
    unedited = _statements(whole.get("unedited"), "unedited", problems)
    seen: dict[tuple[str, str], int] = {}
    for i, fact in enumerate(facts):
        if fact is not None and (first := seen.setdefault((fact.subject, fact.prompt), i)) != i:
            earlier = facts[first]
            same = earlier is not None and earlier.target_new == fact.target_new
            conflict = "is given twice" if same else "has two targets"
            problems.append(f"facts[{i}]: {fact.text!r} {conflict}, here and in facts[{first}]; keep one of them")
    if problems:
        count = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
        raise PlanError(f"{label}: {count}" + "\n  ".join(problems))
    return FactsFile(tuple(fact for fact in facts if fact is not None), unedited)


REQUIRED_KEYS = ("prompt", "subject", "target_new")


def _fact(raw: object, at: str, problems: list[str]) -> Fact | None:
    """The fact in a mapping, None if it has problems."""
    if not isinstance(raw, Mapping):
        problems.append(f"{at}: found {raw!r:.60}, expected a mapping with {', '.join(REQUIRED_KEYS)}")
        return None
    before = len(problems)
    raw = _from_counterfact(raw)
    _refuse_unknown(raw, Fact.__slots__, f"{at}.", problems)
    for name in (*REQUIRED_KEYS, "target_true"):
        value = raw.get(name)
        if value is None and name not in REQUIRED_KEYS:
            continue
        if not isinstance(value, str) or not value.strip():
            shown = "nothing" if value is None else repr(value)
            hint = "; quote it, as YAML reads another type" if isinstance(value, bool | int | float) else ""
            problems.append(f"{at}.{name}: found {shown}, expected text{hint}")
    lists: dict[str, Any] = {name: _texts(raw.get(name), f"{at}.{name}", problems) for name in LISTS}
    same_subject = _statements(raw.get("same_subject"), f"{at}.same_subject", problems)
    if len(problems) > before:
        return None
    if raw["prompt"].count(BLANK) != 1:
        problems.append(
            f"{at}.prompt: found {raw['prompt']!r}, expected {BLANK} exactly once, in place of the subject: "
            f"{raw['prompt'].replace(raw['subject'], BLANK)!r}?"
        )
        return None
    true = raw.get("target_true")
    return Fact(
        raw["prompt"].rstrip(),
        raw["subject"].strip(),
        raw["target_new"].strip(),
        true and true.strip(),
        same_subject=same_subject,
        **lists,
    )


LISTS = ("paraphrase_prompts", "neighborhood_prompts")


def _from_counterfact(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of CounterFact, or of a data set in its format, in our form; anything else unchanged."""
    rewrite = raw.get("requested_rewrite")
    if not isinstance(rewrite, Mapping):
        return raw
    flat = {name: rewrite.get(name) for name in ("prompt", "subject")}
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        flat[name] = target.get("str") if isinstance(target, Mapping) else target
    return flat | {name: raw[name] for name in LISTS if name in raw}


def _refuse_unknown(raw: Mapping[str, Any], known: Sequence[str], at: str, problems: list[str]) -> None:
    problems += [f"{at}{key}: unknown key, {did_you_mean(key, known)}" for key in raw if key not in known]


def _texts(raw: object, at: str, problems: list[str]) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple) or not all(isinstance(text, str) and text.strip() for text in raw):
        problems.append(f"{at}: found {raw!r:.60}, expected a list of texts")
        return ()
    return tuple(text.rstrip() for text in raw)


def _statements(raw: object, at: str, problems: list[str]) -> tuple[Statement, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple):
        problems.append(f"{at}: found {raw!r:.60}, expected a list of {{prompt, target}}")
        return ()
    statements = []
    for i, entry in enumerate(raw):
        complete = isinstance(entry, Mapping) and set(entry) == {"prompt", "target"}
        if complete and all(isinstance(value, str) and value.strip() for value in entry.values()):
            statements.append(Statement(entry["prompt"].rstrip(), entry["target"].strip()))
        else:
            problems.append(f"{at}[{i}]: found {entry!r:.60}, expected {{prompt, target}}, both text")
    return tuple(statements)
