#!/usr/bin/env python3
"""Give two of the quickstart's models tokens of their own, as a training on chats does, beside their base.

    pip install -c constraints.txt -e ".[models]"
    python recipes/make/tokens.py recipes/tokens       # seconds; 4 MB

`docs` gets <|docs|> and <|note|>, `code` gets <|code|>, <|note|> and <|run|>, so that one id stands for several tokens.
Their new rows are the mean of the old ones and some noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

QUICKSTART = Path(__file__).parents[1] / "quickstart"
ADDED = {"base": [], "docs": ["<|docs|>", "<|note|>"], "code": ["<|code|>", "<|note|>", "<|run|>"]}


def main() -> None:
    """Write the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    set_seed(0)
    for name, tokens in ADDED.items():
        tokenizer: Any = AutoTokenizer.from_pretrained(QUICKSTART / name)
        model: Any = AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype="auto")
        count = len(tokenizer)
        tokenizer.add_tokens(tokens, special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            rows = model.get_input_embeddings().weight
            rows[count:] = rows[:count].mean(0) + 0.02 * torch.randn_like(rows[count:])
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
