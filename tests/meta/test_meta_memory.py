"""The memory of a step as it is planned, beside what a process holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
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
numbers = sum(x.numel() for x in model.parameters())
options = SimpleNamespace(optimizer="adamw", batch_size=2, accumulate=1)
recipe = SimpleNamespace(task="classification", window=64, row=row, inner=(3, 0.1), ways=5, shots=3, queries=5)
recipe.options, recipe.own_settings = options, defaults_of(row.parameters)
planned = estimate_need(recipe, config.to_dict(), numbers).inner
"""
OF_IMAGES = """
from types import SimpleNamespace
import torch, transformers
from mergekit_lfm.meta.black_box import BlackBox
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.meta.pool import Pool, PoolEpisodes
from mergekit_lfm.meta.without_data import BiDf, Purer
from mergekit_lfm.recipe.meta_memory import estimate_need_of_images

torch.set_num_threads(1)
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
config = transformers.ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=4)
model, *teachers = (transformers.ViTForImageClassification(config) for _ in range(4))
pool, calls = Pool(3, 4, 20, (3, 32, 32)), torch.zeros(2, dtype=torch.long)
for teacher in teachers:
    teacher.requires_grad_(False)
name, inner = sys.argv[1], Inner(3, 0.1)
if name == "purer":
    loss = Purer(model, inner, teachers, pool, "pixel_values", curriculum=1.0)
else:
    loss = BiDf(model, inner, [BlackBox(x, calls) for x in teachers], pool, "pixel_values", directions=4)
batch = PoolEpisodes(3, 4, 20, 5, 10, alone=name == "bidf").batch(range(2))
numbers = sum(x.numel() for x in model.parameters())
recipe = SimpleNamespace(algorithm=name, inner_steps=3, shots=5, queries=10, count=20, batch_size=2)
need = estimate_need_of_images(recipe, 4, [(config.to_dict(), numbers)] * 4)
planned = need.total - 4 * (3 + 2) * numbers  # without the teachers, and the optimizer's moments
"""

WATCHED = """
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
print(json.dumps([max(peaks) - before, planned]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "proto", "editable", "purer", "bidf"])
def test_a_step_holds_as_much_as_is_planned(name: str) -> None:
    program = "import json, sys, threading\n" + (OF_IMAGES if name in ("purer", "bidf") else PROGRAM) + WATCHED
    ran = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True)
    held, planned = json.loads(ran.stdout.splitlines()[-1])
    assert 0.6 < planned / held < 1.7, (held, planned)
