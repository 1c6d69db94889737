#!/usr/bin/env python3
"""Make the checkpoints and texts of recipes/quickstart/: a tiny language model, and two fine-tunes of it.

    pip install -c constraints.txt -e ".[models]"
    python recipes/make/quickstart.py recipes/quickstart

All text comes from the running Python: the base model reads docstrings and some source code of the standard library,
the fine-tune `docs` the language reference (pydoc_data.topics), the fine-tune `code` source code. `docs.txt` and
`code.txt` are held out: whole topics and modules; no model has read a paragraph of them.

Takes some minutes on one core. The seeds are fixed, but another Python release has other texts, and another machine
or number of threads rounds differently: the result is then as good, and not the same to the byte.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

WINDOW = 128  # tokens; also the model's number of positions
BATCH = 16
BASE_STEPS, BASE_RATE = 1200, 4e-3
TUNE_STEPS, TUNE_RATE = 300, 1e-3
START = "<s>"  # between documents; BOS and EOS in one
# Not part of every installation or release, not written by hand, or hardly text.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "distutils", "idlelib", "lib2to3", "turtledemo"}
EXCLUDED |= {"pydoc_data", "encodings"}


@dataclass(frozen=True)
class Corpus:
    """Lists of documents. Nothing in held_out, by paragraph, is in the rest."""

    base: list[str]
    tune: dict[str, list[str]]  # by domain
    held_out: dict[str, list[str]]  # by domain


def make_corpus() -> Corpus:
    """The texts of the running Python, divided by hashes of the names of topics and modules."""
    modules = _modules()
    held_out_topics = {name for name in topics if _share(name, 6) == 2}  # remainders that give some 30 kB of each
    held_out_modules = {name for name in modules if _share(name, 80) == 44}
    read = {name: source for name, source in modules.items() if name not in held_out_modules}
    texts = _unique(topics)
    held_out = {
        "docs": [texts[name] for name in sorted(held_out_topics)],
        "code": [modules[name] for name in sorted(held_out_modules)],
    }
    known = {paragraph for documents in held_out.values() for text in documents for paragraph in paragraphs(text)}
    base = [_docstrings(source) for source in read.values()]
    base += [source for name, source in read.items() if _share(name, 8) == 1]
    docs = [text for name, text in texts.items() if name not in held_out_topics]
    code = [source for name, source in read.items() if _share(name, 4) == 0]
    return Corpus(_without(base, known), {"docs": _without(docs, known), "code": _without(code, known)}, held_out)


def paragraphs(text: str) -> set[str]:
    """The paragraphs that say something, on one line each; a shorter one (`import sys`) can stand in any text."""
    found = (" ".join(block.split()) for block in text.split("\n\n"))
    return {paragraph for paragraph in found if len(paragraph) >= 40}


def _without(documents: Iterable[str], known: set[str]) -> list[str]:
    kept = ("\n\n".join(b for b in text.split("\n\n") if not paragraphs(b) & known) for text in documents)
    return [text for text in kept if text.strip()]


def _unique(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts in order of their names, without the paragraphs that an earlier one had: topics contain one another."""
    seen: set[str] = set()
    unique = {}
    for name in sorted(texts):
        blocks = [block for block in texts[name].split("\n\n") if " ".join(block.split()) not in seen]
        seen.update(" ".join(block.split()) for block in blocks)
        unique[name] = "\n\n".join(blocks).rstrip() + "\n"
    return unique


def _share(name: str, parts: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()) % parts


def _modules() -> dict[str, str]:
    """Sources of the standard library by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [
        name for name in sorted(paths) if not EXCLUDED & {*name.split("/")} and not name.startswith("_sysconfigdata")
    ]
    return {name: paths[name].read_text("utf-8") for name in names}


def _docstrings(source: str) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def make_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 entries: it encodes any text, and adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus.base, *corpus.tune["docs"], *corpus.tune["code"]], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=START,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """Llama's architecture with 0.65 M parameters: grouped queries, tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: torch.Tensor, *, steps: int, rate: float) -> None:
    """AdamW on random windows of ids; the rate rises over 50 steps and falls to zero in a line."""
    model.train()
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        begins = torch.randint(len(ids) - WINDOW + 1, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[begin : begin + WINDOW] for begin in begins])  # [batch, window]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step} of {steps}: {loss.item():.3f}", flush=True)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> torch.Tensor:
    """The documents' tokens in a row, each document after a start token."""
    return torch.tensor(tokenizer(START + START.join(documents), add_special_tokens=False, verbose=False)["input_ids"])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Round the model to bf16, for good, and save it."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)  # type: ignore[arg-type]  # the stubs know devices only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for base/, docs/, code/, docs.txt and code.txt")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    corpus = make_corpus()
    for domain, documents in corpus.held_out.items():
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{domain}.txt").write_text("\n".join(documents), "utf-8")
    tokenizer, model = make_tokenizer(corpus), make_model()
    print("base")
    train(model, encode(tokenizer, corpus.base), steps=BASE_STEPS, rate=BASE_RATE)
    save(model, tokenizer, options.out / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for domain, documents in corpus.tune.items():
        print(domain)
        model.load_state_dict(base)
        train(model, encode(tokenizer, documents), steps=TUNE_STEPS, rate=TUNE_RATE)
        save(model, tokenizer, options.out / domain)


if __name__ == "__main__":
    main()
