"""Judge edits of facts by ROME, MEMIT and fine-tuning, and their damage, on a model that has learned 480 facts.

    python recipes/make/facts.py recipes/facts
    python benchmarks/editing.py recipes/facts               # some minutes on one core
    python benchmarks/editing.py recipes/facts --quick       # a smoke test

Numbers are percentages. ES, PS and NS compare the new and the true object after the prompts, after paraphrases of them,
and after prompts about other subjects with the same true object; EA and NA ask whether the model would say the right
one; SA is about other facts of the edited subjects, `unedited` about facts of other subjects. |W'|/|W| is the greatest
among the edited matrices. One fact: the mean of single edits. Seconds are those of the edit, without the statistics.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergekit_lfm.artifacts.facts import Fact, FactsFile, read_facts_file
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.collect.run import collect
from mergekit_lfm.edit.scores import FactScores, score_facts
from mergekit_lfm.edit.sites import find_sites
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.runtime.load import Loaded, load_model, logits
from mergekit_lfm.version import __version__
from mergekit_lfm.views.patched import patched_view

SIZES = (1, 10, 40, 100)
SINGLES = 20  # edits of one fact each
EPOCHS, RATE, BATCH = 30, 3e-3, 10  # of fine-tuning
SHOWN = {"es": "ES", "ps": "PS", "ns": "NS", "ea": "EA", "na": "NA", "sa": "SA", "unedited": "unedited"}
GROWTH = r"\|W'\|/\|W\|"  # escaped for a Markdown table

# Fillers of the made-up world, so that the model has seen the sentences before a prompt.
CONTEXTS = [
    "{}",
    "The weather looked fine this morning. {}",
    "The train was late as usual. {}",
    "The market caused trouble last week. {}",
    "A long letter was a surprise in spring. {}",
    "The news was late last week. {}",
]


@dataclass(frozen=True)
class Subject:
    """The model of a folder that `facts.py` has made, and the second moments of its layers' inputs."""

    folder: Path
    loaded: Loaded
    grams: Statistics

    def facts(self, name: str) -> FactsFile:
        """A facts file of the folder, by its name without the ending."""
        return read_facts_file(self.folder / f"{name}.yaml")


@dataclass(frozen=True)
class Edited:
    """A model after an edit. growth: the greatest |W'|/|W|; seconds: the time of the edit."""

    model: nn.Module
    growth: float
    seconds: float


Editor = Callable[[Subject, FactsFile], Edited]


def open_subject(folder: Path, work: Path) -> Subject:
    """The folder's model; statistics of its text are left in work."""
    grams = collect(
        "gram",
        folder / "model",
        folder / "text.txt",
        work / "gram.safetensors",
        task="lm",
        layers=["c_proj"],
        window=64,
        overwrite=True,
    )
    return Subject(folder, load_model(folder / "model", "lm"), grams)


def located(subject: Subject, facts: FactsFile, **options: Any) -> Edited:
    """The model edited by `edit` with these options, and loaded again with the patch."""
    start = time.perf_counter()
    all_options = {"covariance": subject.grams, "context_templates": CONTEXTS, **options}
    patch = edit(subject.loaded, None, FactsFile(facts.facts), **all_options)
    seconds = time.perf_counter() - start
    return _measure_growth(subject, load_model(patched_view(subject.loaded.checkpoint, patch), "lm").model, seconds)


def fine_tuned(subject: Subject, facts: FactsFile, *, layer: int = 0, rate: float = RATE) -> Edited:
    """The model with a layer's down-projection trained on the facts' targets, by Adam without a constraint."""
    start = time.perf_counter()
    model = copy.deepcopy(subject.loaded.model)
    weight = model.requires_grad_(False).get_parameter(find_sites(model)[layer].weight).requires_grad_(True)
    optimizer, draw = torch.optim.Adam([weight], lr=rate), torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(facts.facts), generator=draw).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            torch.autograd.backward(_loss(model, subject.loaded.tokenizer, [facts.facts[row] for row in rows.tolist()]))
            optimizer.step()
    return _measure_growth(subject, model.requires_grad_(False), time.perf_counter() - start)


def _loss(model: nn.Module, tokenizer: Any, facts: Sequence[Fact]) -> Tensor:
    """The mean cross entropy of the targets' tokens."""
    prompts = [tokenizer(fact.text)["input_ids"] for fact in facts]
    targets = [tokenizer(f" {fact.target_new}")["input_ids"] for fact in facts]
    rows = [torch.tensor(prompt + target) for prompt, target in zip(prompts, targets, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, target in zip(scored, prompts, targets, strict=True):
        row[len(prompt) : len(prompt) + len(target)] = True
    return cross_entropy(logits(model(input_ids=ids))[:, :-1][scored[:, 1:]], ids[:, 1:][scored[:, 1:]])


def _measure_growth(subject: Subject, model: nn.Module, seconds: float) -> Edited:
    """The edited model with the growth of its matrices."""
    before = subject.loaded.model
    names = [site.weight for site in find_sites(before)]
    growth = max(float(model.get_parameter(x).detach().norm() / before.get_parameter(x).detach().norm()) for x in names)
    return Edited(model, growth, seconds)


METHODS: Mapping[str, Editor] = {
    "ROME, layer 0": partial(located, method="rome", layers=[0], clamp=4.0),
    "MEMIT, layer 0": partial(located, method="memit", layers=[0], clamp=1.5, lambda_ratio=0.3),
    "MEMIT, layers 0-3": partial(located, method="memit", layers=[0, 1, 2, 3], clamp=0.75, lambda_ratio=0.3),
    "fine-tuning, layer 0": fine_tuned,
}


def measure(subject: Subject, editor: Editor, facts: FactsFile) -> dict[str, float]:
    """Every column's number."""
    edited = editor(subject, facts)
    scores: FactScores = score_facts(edited.model, subject.loaded.tokenizer, facts)
    shares = {shown: 100 * getattr(scores, name) for name, shown in SHOWN.items() if getattr(scores, name) is not None}
    return {**shares, GROWTH: edited.growth, "seconds": edited.seconds}


def measure_singly(subject: Subject, editor: Editor, facts: FactsFile) -> dict[str, float]:
    """The means over edits of one fact each."""
    each = [measure(subject, editor, FactsFile((fact,), facts.unedited)) for fact in facts.facts]
    columns = {column: [one[column] for one in each if column in one] for column in each[0]}
    return {column: statistics.mean(numbers) for column, numbers in columns.items()}


def rows(subject: Subject, sizes: Sequence[int]) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Yield (size, method, numbers) as they are measured; size 0 is the unedited model."""
    whole = subject.facts(f"facts_{max(SIZES)}")
    yield 0, "as it is", measure(subject, lambda subject, _: _measure_growth(subject, subject.loaded.model, 0.0), whole)
    for size in sizes:
        for name, editor in METHODS.items():
            if size > 1:
                yield size, name, measure(subject, editor, subject.facts(f"facts_{size}"))
            else:
                singles = FactsFile(whole.facts[:SINGLES], whole.unedited)
                yield size, name, measure_singly(subject, editor, singles)


def as_row(size: int, name: str, numbers: Mapping[str, float]) -> str:
    """The numbers as a line of a Markdown table."""
    shares = [f"{numbers[column]:.1f}" for column in SHOWN.values()]
    return f"| {size or '-'} | {name} | {' | '.join(shares)} | {numbers[GROWTH]:.2f} | {numbers['seconds']:.1f} |"


def main() -> None:
    """Edit and judge; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what recipes/make/facts.py has made")
    parser.add_argument("--quick", action="store_true", help="ten facts only")
    arguments = parser.parse_args()
    if not (arguments.folder / "model").is_dir():
        parser.error(f"found no model/ in {arguments.folder}; make it with recipes/make/facts.py")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"mergekit_lfm {__version__}, {platform.machine()}, Python {platform.python_version()}, {versions}\n")
    print(f"| facts | method | {' | '.join(SHOWN.values())} | {GROWTH} | seconds |")
    print("|--:|---|" + "--:|" * (len(SHOWN) + 2))
    with tempfile.TemporaryDirectory(prefix="editing_") as work:
        for size, name, numbers in rows(
            open_subject(arguments.folder, Path(work)), (10,) if arguments.quick else SIZES
        ):
            print(as_row(size, name, numbers), flush=True)
            print(f"{name}: {size}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
