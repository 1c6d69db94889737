#!/usr/bin/env python3
"""Train three LoRAs of the quickstart's base model: one on the language reference, one on code, one on recipes.

    pip install -c constraints.txt -e ".[test]"
    python recipes/make/loras.py recipes/adapters       # a minute on one core; 0.4 MB

The topics and modules of docs.txt and code.txt are left out, so that `mergekit-lfm eval` can judge on them.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = Path(__file__).parents[1]
BASE = RECIPES / "quickstart" / "base"
WINDOW, BATCH, RATE = 128, 8, 1e-3
ATTENTION, NETWORK = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "docs": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *NETWORK]},
    "code": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *NETWORK]},
    "recipes": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION},
}


def read_texts() -> dict[str, str]:
    """The text that each adapter reads."""
    held_out = {name: (RECIPES / "quickstart" / f"{name}.txt").read_text("utf-8") for name in ("docs", "code")}
    docs = [text for text in topics.values() if text[:200] not in held_out["docs"]]
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]
    modules = [path.read_text("utf-8") for path in paths]
    code = [text for text in modules if text[:200] not in held_out["code"]]
    recipes = [path.read_text("utf-8") for path in sorted(RECIPES.glob("*.yaml"))]
    return {"docs": "\n".join(docs), "code": "\n".join(code), "recipes": "\n".join(recipes)}


def train(model: Any, ids: torch.Tensor, steps: int) -> None:
    """AdamW on random windows of ids; the rate falls to zero in a line."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        begins = torch.randint(len(ids) - WINDOW + 1, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[begin : begin + WINDOW] for begin in begins])  # [batch, window]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()


def main() -> None:
    """Write the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    for name, text in read_texts().items():
        torch.manual_seed(0)
        base: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **CONFIGS[name]))
        train(model, torch.tensor(tokenizer(text, verbose=False)["input_ids"]), options.steps)
        model.peft_config["default"].base_model_name_or_path = "recipes/quickstart/base"
        model.save_pretrained(options.folder / name)


if __name__ == "__main__":
    main()
