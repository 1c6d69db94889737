"""The memory of a step as it is planned, beside what a process holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, threading, time
from types import SimpleNamespace
import torch, transformers
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.meta_memory import estimate_need
from mergekit_lfm.recipe.options import defaults_of

torch.set_num_threads(1)
sizes = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
config = transformers.BertConfig(**sizes, intermediate_size=512, num_labels=5)
model = transformers.BertForSequenceClassification(config).train()
row = ALGORITHMS[sys.argv[1]]
batch = {}
for side, count in (("support", 3), ("query", 5)):
    ids = torch.randint(5, 1000, (2, 5 * count, 64))
    labels = torch.arange(5).repeat_interleave(count).repeat(2, 1)
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {f"{side}/{name}": x for name, x in named.items()}
loss = build_loss(model, "classification", row, Inner(3, 0.1))
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, peaks, over = held(), [], threading.Event()

def watch():
    while not over.wait(0.002):
        peaks.append(held())

watcher = threading.Thread(target=watch)
watcher.start()
loss(model, batch).total.backward()
over.set()
watcher.join()
numbers = sum(x.numel() for x in model.parameters())
options = SimpleNamespace(optimizer="adamw", batch_size=2, accumulate=1)
recipe = SimpleNamespace(task="classification", window=64, row=row, inner=(3, 0.1), ways=5, shots=3, queries=5)
recipe.options, recipe.own_settings = options, defaults_of(row.parameters)
print(json.dumps([max(peaks) - before, estimate_need(recipe, config.to_dict(), numbers).inner]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "proto", "editable"])
def test_a_step_holds_as_much_as_is_planned(name: str) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True)
    held, planned = json.loads(ran.stdout.splitlines()[-1])
    assert 0.6 < planned / held < 1.7, (held, planned)
