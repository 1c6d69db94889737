#!/usr/bin/env python3
"""Make the inputs of recipes/llamas_aligned.yaml: two tiny Llamas that share an architecture and a text, and no more.

    pip install -c constraints.txt -e ".[models]"
    python recipes/make/llamas.py recipes/llamas               # five minutes on one core; 4 MB
    mergekit-lfm stats cross recipes/llamas/a recipes/llamas/b --data recipes/llamas/sample.txt --task lm \\
        -o recipes/llamas/ab.cross.safetensors
    merge recipes/llamas_aligned.yaml

One token is a character of the documentation of the running Python: topics of the language reference and docstrings of
the standard library. Whole topics are held out. The models differ in their start and in the order of what they read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.append(str(Path(__file__).parent))
from quickstart import make_corpus

CHARACTERS = 90  # the most frequent ones; one more token stands for all others
WINDOW, BATCH = 128, 16
STEPS, WARM_UP, RATE = 1500, 100, 3e-3
SAMPLE = 16_384  # characters of what they read, for statistics


def make_texts() -> tuple[str, str]:
    """The text that the models read and the text that is held out; they share no paragraph."""
    corpus = make_corpus()
    read, held_out = ("\n".join(texts) for texts in (corpus.base + corpus.tune["docs"], corpus.held_out["docs"]))
    return read, held_out


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A token for each of the most frequent characters of the text; a line begins what begins a text."""
    frequent = [character for character, _ in Counter(text).most_common(CHARACTERS)]
    vocabulary = {token: i for i, token in enumerate([*frequent, "\N{REPLACEMENT CHARACTER}"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\N{REPLACEMENT CHARACTER}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="\n",
        eos_token="\n",
        unk_token="\N{REPLACEMENT CHARACTER}",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Llama's architecture with 0.4 M parameters, the head not tied to the embedding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: torch.Tensor, *, steps: int, seed: int) -> None:
    """AdamW on random windows of ids; the rate rises, and falls as a cosine does."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        begins = torch.randint(len(ids) - WINDOW, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[begin : begin + WINDOW + 1] for begin in begins])  # [batch, window + 1]
        scores = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step} of {steps}: {loss.item():.3f}", file=sys.stderr, flush=True)


def make_llamas(out: Path, *, seed: int = 0, steps: int = STEPS) -> None:
    """a/ and b/ in out, which share no random number; sample.txt and held_out.txt. Models that are there are kept."""
    read, held_out = make_texts()
    tokenizer = make_tokenizer(read)
    ids = torch.tensor(tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "sample.txt").write_text(read[:SAMPLE], "utf-8")
    (out / "held_out.txt").write_text(held_out, "utf-8")
    for i, name in enumerate("ab"):
        if not (out / name).exists():
            model = make_model(len(tokenizer), 2 * seed + i)
            train(model, ids, steps=steps, seed=2 * seed + i)
            tokenizer.save_pretrained(out / name)
            model.save_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for a/, b/, sample.txt and held_out.txt")
    parser.add_argument("--seed", type=int, default=0, help="of both models [default: 0]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training [default: {STEPS}]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    make_llamas(options.out, seed=options.seed, steps=options.steps)
    (options.out / ".gitignore").write_text("*\n", "utf-8")


if __name__ == "__main__":
    main()
