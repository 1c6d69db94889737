"""Compare the training loop with a bare loop in torch, and with the Trainer of transformers, on the same work.

    python benchmarks/tune_vs_loop.py                 # a Llama of 10 million parameters, 30 steps each; four minutes
    python benchmarks/tune_vs_loop.py --steps 5       # a smoke test

All three train the same model on the same batches by AdamW at a constant rate, in float32 on the processor, and each
run is a process of its own: tokens per second of the steps after the first tenth, and the peak of its memory. Runs
alternate; numbers are medians. `ours` writes its state from time to time and a record of every step, as always.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_lfm.machine.sizes import format_size

WAYS = ("bare", "ours", "trainer")
BATCH, TOKENS, VOCABULARY = 16, 128, 2048


def make_model() -> Any:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=320,
            intermediate_size=880,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=TOKENS,
        )
    )


def make_rows(steps: int) -> Any:
    """Random tokens for all steps, int64 [steps * BATCH, TOKENS]."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (steps * BATCH, TOKENS), generator=generator)


def train_bare(steps: int, _: Path) -> list[float]:
    """A loop of ten lines; the times at which its steps ended."""
    import torch

    model, rows, ends = make_model(), make_rows(steps), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        scores = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.monotonic())
    return ends


def train_ours(steps: int, folder: Path) -> list[float]:
    """`fit`."""
    from mergekit_lfm.recipe.training import Options
    from mergekit_lfm.train.examples import Examples
    from mergekit_lfm.train.loop import fit
    from mergekit_lfm.train.losses import next_token

    ends = list[float]()
    examples = Examples(
        [{"input_ids": row, "labels": row} for row in make_rows(steps)], {"input_ids": 0, "labels": -100}
    )
    options = Options(steps=steps, batch_size=BATCH, learning_rate=1e-4, schedule="constant")
    fit(make_model(), examples, next_token, options, place=folder, tell=lambda *_: ends.append(time.monotonic()))
    return ends


def train_by_trainer(steps: int, folder: Path) -> list[float]:
    """The Trainer of transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends = list[float]()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    import torch

    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in make_rows(steps)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(make_model(), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return ends


def run(way: str, steps: int) -> None:
    """Train in this process, and print the tokens per second and the peak of memory."""
    train = {"bare": train_bare, "ours": train_ours, "trainer": train_by_trainer}[way]
    with tempfile.TemporaryDirectory() as folder:
        ends = train(steps, Path(folder))
    first = max(1, steps // 10) - 1
    rate = (steps - 1 - first) * BATCH * TOKENS / (ends[-1] - ends[first])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rate": rate, "peak": peak}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each run [default: 30]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind [default: 3]")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.way:
        run(chosen.way, chosen.steps)
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(chosen.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--steps", str(chosen.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    names = ("transformers", "torch", "mergekit_lfm")
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in names)}\n")
    print("| way | tokens/s | of the bare loop | peak memory |\n|---|--:|--:|--:|")
    median = {
        way: {k: statistics.median(each[k] for each in runs) for k in ("rate", "peak")} for way, runs in found.items()
    }
    for way, each in median.items():
        share = each["rate"] / median["bare"]["rate"]
        print(f"| {way} | {each['rate']:,.0f} | {share:.3f} | {format_size(int(each['peak']))} |")


if __name__ == "__main__":
    main()
