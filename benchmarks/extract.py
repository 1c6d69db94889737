#!/usr/bin/env python3
"""How much of a fine-tune a LoRA keeps, by its rank: a table, and a plot with a line for each kind of layer.

python benchmarks/extract.py models/tuned --base models/base --plot docs/extract_kept.png

Without models it takes published ones: rxnfp's classifier of chemical reactions and the BERT that it was made from
(pip download rxnfp==0.1.0 --no-deps, 75 MB), whose outputs it also compares.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mergekit_lfm import extract_lora
from mergekit_lfm.api.extract import Extracted
from mergekit_lfm.commands.show.extractions import layer_of
from mergekit_lfm.commands.show.plots import COLOURS, MARKS
from mergekit_lfm.machine.sizes import format_size

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = "rxnfp/models/transformers"
TUNED, BASE = f"{MODELS}/bert_ft_10k_25s", f"{MODELS}/bert_pretrained"
EXAMPLES, LENGTH = 256, 40  # of random tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, base = options.model, options.base
        if published := model is None:
            model, base = _fetch(Path(folder))
        outputs = _outputs(model) if published else None
        kept: dict[int, Extracted] = {}
        print("| rank | size | kept |" + (" same answer |" if published else ""))
        print("|--:|--:|--:|" + ("--:|" if published else ""))
        for rank in RANKS:
            out = Path(folder) / str(rank)
            kept[rank] = extract_lora(model, base, out, rank=rank).result
            same = "" if outputs is None else f" {_agreement(base, out, outputs):.1%} |"
            print(f"| {rank} | {format_size(kept[rank].nbytes)} | {kept[rank].kept:.1%} |{same}", flush=True)
    if options.plot:
        _draw(kept, options.plot)


def _fetch(folder: Path) -> tuple[Path, Path]:
    """The published models."""
    command = [sys.executable, "-m", "pip", "download", "-q", "rxnfp==0.1.0", "--no-deps", "-d", str(folder)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("rxnfp-*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / TUNED, folder / BASE


def _outputs(model: Path) -> Any:
    """The answers [examples] of a classifier to random tokens."""
    import transformers

    return _answers(transformers.BertForSequenceClassification.from_pretrained(model, num_labels=50))


def _agreement(base: Path, adapter: Path, outputs: Any) -> float:
    """The share of examples for which the base with the adapter gives the same answer, as peft applies it."""
    import peft
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=50)
    return float((_answers(peft.PeftModel.from_pretrained(model, str(adapter))) == outputs).float().mean())


def _answers(model: Any) -> Any:
    import torch

    ids = torch.randint(5, 590, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.argmax(1)


def _draw(kept: dict[int, Extracted], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    layers = list(dict.fromkeys(layer_of(each.name) for each in kept[RANKS[0]].reduced))
    for i, layer in enumerate(layers[: len(COLOURS)]):
        shares = []
        for extracted in kept.values():
            own = [each for each in extracted.reduced if layer_of(each.name) == layer]
            shares.append(sum(each.kept for each in own) / sum(each.energy for each in own))
        axes.plot(list(kept), shares, color=COLOURS[i], marker=MARKS[i], markersize=4, label=layer)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(kept), [str(rank) for rank in kept])
    axes.set_xlabel("rank")
    axes.set_ylabel("kept share of the change's energy")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
