"""Edit facts by a few steps of plain descent, in a model as it is and in one that was trained for that.

    python recipes/make/facts.py recipes/facts
    python benchmarks/meta_editable.py recipes/facts                    # some ten minutes on one core
    python benchmarks/meta_editable.py recipes/facts --steps 2 --facts 4  # a smoke test

The model has learned 480 facts. Editable training takes eighty edits and the right answers about their neighbours and
subjects; beside it stands ordinary training on these answers for as many steps. Then other facts are edited one at a
time, by descent on the new completion. Numbers are those of the judge of edits, in percent: EA, the model would say the
new target; PA, also after paraphrases; NA and `unedited`, it still says the right ones about neighbours, and about
others. Each model has the rate and the steps of one grid with the best mean of the four on half of the facts; numbers
are of the other half.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_lfm import meta_train, tune_model
from mergekit_lfm.artifacts.facts import Fact, FactsFile, read_facts_file
from mergekit_lfm.edit.scores import score_facts
from mergekit_lfm.meta.adapt import adapt
from mergekit_lfm.meta.objective import TaskObjective
from mergekit_lfm.runtime.functional import functional_model
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.train.texts import read_examples

TAUGHT = 80  # edits of the training
GRID = [(count, rate) for rate in (0.001, 0.003, 0.01, 0.03, 0.1) for count in (1, 3, 10)]
SHOWN = {"ea": "EA", "pa": "PA", "na": "NA", "unedited": "unedited"}
HOW: dict[str, Any] = {"task": "lm", "threads": 1, "window": 64, "learning_rate": 1e-4}


def write_answers(file: Path, answers: Iterable[tuple[str, str]]) -> Path:
    """A file of prompts and their completions."""
    lines = ({"prompt": prompt, "completion": f" {target}"} for prompt, target in answers)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_edits(file: Path, facts: Sequence[Fact]) -> Path:
    """A file of prompts and their new completions."""
    return write_answers(file, ((fact.text, fact.target_new) for fact in facts))


def write_others(file: Path, known: FactsFile) -> Path:
    """A file of right answers about neighbours and subjects of the edits of the training; none is judged."""
    taught, tests = known.facts[:TAUGHT], known.facts[TAUGHT:]
    pairs = [(prompt, fact.target_true or "") for fact in taught for prompt in fact.neighborhood_prompts]
    pairs += [(each.prompt, each.target) for fact in taught for each in fact.same_subject]
    judged = {*(fact.subject for fact in tests), *(each.prompt for each in known.unedited)}
    return write_answers(file, [pair for pair in pairs if not any(text in pair[0] for text in judged)])


def edited(loaded: Loaded, fact: Fact, place: Path, cell: tuple[int, float]) -> nn.Module:
    """The model after so many steps of descent on a fact."""
    model, (steps, rate) = copy.deepcopy(loaded.model), cell
    support = read_examples(write_edits(place / "fact.jsonl", [fact]), loaded, window=64).batch([0])
    objective = TaskObjective(functional_model(model), "lm")
    start = {name: x.detach() for name, x in model.named_parameters()}
    found = adapt(objective, start, support, steps=steps, rate=rate, first_order=True)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(found[name])
    return model


def judged(loaded: Loaded, facts: FactsFile, place: Path, cell: tuple[int, float]) -> dict[str, float]:
    """The means of the scores over edits of one fact each."""
    rows = list[Mapping[str, float]]()
    for fact in facts.facts:
        scores = score_facts(edited(loaded, fact, place, cell), loaded.tokenizer, FactsFile((fact,), facts.unedited))
        rows.append({name: 100 * (getattr(scores, name) or 0.0) for name in SHOWN})
    return {name: statistics.mean(row[name] for row in rows) for name in SHOWN}


def main() -> None:
    """Train, edit and judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what recipes/make/facts.py has made")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--facts", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole, model = (options.folder / name for name in ("facts_100.yaml", "model"))
    known = read_facts_file(whole)
    tests = known.facts[TAUGHT : TAUGHT + options.facts]
    halves = [FactsFile(tests[half::2], known.unedited) for half in (0, 1)]
    print(f"| model | {' | '.join(SHOWN.values())} | mean |\n|---|{'--:|' * (len(SHOWN) + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        edits, steps = write_edits(place / "edits.jsonl", known.facts[:TAUGHT]), options.steps
        others = write_others(place / "others.jsonl", known)
        tune_model(model, others, place / "trained", steps=steps, batch_size=32, **HOW)
        tasks: dict[str, Any] = {"shots": 1, "queries": 16, "batch_size": 4, "inner_steps": 3, "inner_rate": 0.1}
        meta_train(model, [edits, others], place / "editable", algorithm="editable", steps=steps, **tasks, **HOW)
        for name in ("as it is", "trained", "editable"):
            began = time.monotonic()
            loaded = load_model(model if name == "as it is" else place / name, "lm")
            tried = {cell: judged(loaded, halves[0], place, cell) for cell in GRID}
            best = max(tried, key=lambda cell: sum(tried[cell].values()))
            numbers = judged(loaded, halves[1], place, best)
            shown = " | ".join(f"{x:.1f}" for x in (*numbers.values(), statistics.mean(numbers.values())))
            print(f"| {name} | {shown} |", flush=True)
            print(f"# {name}: {best[0]} steps at {best[1]}, {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
