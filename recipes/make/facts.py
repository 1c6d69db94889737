#!/usr/bin/env python3
"""Make a small language model that has learned 480 facts, and files of edits of them.

    pip install -c constraints.txt -e ".[models]"
    python recipes/make/facts.py recipes/facts                 # three minutes on one core; 6 MB

The world is made up: 120 people, and of each the place of birth, the job, the language and the instrument. The model is
made so that it looks up a fact where large models do: an MLP at the last token of the subject, in the lower layers.
These see two tokens each, so that nothing but the last layers can bring a fact to the token that needs it; many people
share each name, so that only both names together tell. `--control` makes a model without all that.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

sys.path.append(str(Path(__file__).parent))
from facts_world import OBJECTS, SUBJECTS, TEMPLATES, World, make_files, make_texts, make_world, plain

START = "<|endoftext|>"
VOCABULARY, CONTEXT = 1000, 128
LEARNT_FROM, SAMPLE = 6000, 2500  # texts: for the tokenizer; for covariances, about 40,000 tokens

STEPS, CONTROL_STEPS = 700, 1000
WARM_UP, RATE = 60, 2e-3
EMBEDDING_RATE = 0.3  # of RATE: among large embeddings no MLP moves the state far, and so no edit can
ROW, ROWS, ROSTERS = 64, 10, 3  # tokens in a row; rows in a batch, and how many of them are rosters
AFTER_NAME = 24.0  # weight in the loss of what follows a name of a roster


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts. It adds no token by itself; START may stand before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=START,
        pad_token=START,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int, seed: int, *, control: bool = False) -> PreTrainedModel:
    """GPT-Neo of 1.3 M parameters, whose first four layers see two tokens each; control: GPT-2, which sees them all."""
    heads, width, layers = 4, 128, 6
    config: PreTrainedConfig
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if control:
            config = GPT2Config(
                vocab_size=vocabulary,
                n_positions=CONTEXT,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
            return GPT2LMHeadModel(config)
        config = GPTNeoConfig(
            vocab_size=vocabulary,
            max_position_embeddings=CONTEXT,
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=4 * width,
            attention_types=[[["local"], 4], [["global"], 2]],
            window_size=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPTNeoForCausalLM(config)


class Document(NamedTuple):
    """A text in tokens: how much each matters in the loss, and whose name ends there: a number, or -1."""

    ids: list[int]
    weights: list[float]
    names: list[int]


@dataclass(frozen=True)
class Corpus:
    """The texts and rosters of a world that a model learns from, drawn as they are needed."""

    world: World
    tokenizer: PreTrainedTokenizerFast
    draw: random.Random

    def texts(self) -> Iterator[Document]:
        """Every second begins with START. Nothing foresees a first token, which therefore has no weight."""
        for text in make_texts(self.world, self.draw):
            encoding = self.tokenizer(plain(text), return_offsets_mapping=True)
            weights = [weight for piece, weight in text for _ in piece]  # of every character
            ids, found = encoding["input_ids"], [weights[end - 1] for _, end in encoding["offset_mapping"]]
            found = [0.0, *found] if (begins := self.draw.random() < 0.5) else [0.0, *found[1:]]
            ids = [self.tokenizer.bos_token_id, *ids] if begins else ids
            yield Document(ids, found, [-1] * len(ids))

    def roster(self) -> Document:
        """Names, each with something of that person: "Ada Blake Paris. Leo Rossi baker." What follows a name counts."""
        people = list(self.world.facts.items())
        ids, names = ([self.tokenizer.bos_token_id], [-1]) if self.draw.random() < 0.5 else ([], [])
        while True:
            number = self.draw.randrange(len(people))
            name, known = people[number]
            subject = self.tokenizer(f" {name}" if len(ids) > 1 else name)["input_ids"]
            line = subject + self.tokenizer(f" {self.draw.choice(list(known.values()))}.")["input_ids"]
            if len(ids) + len(line) > ROW:
                return Document(ids, [0.0] * len(ids), names)
            names += [number if at == len(subject) - 1 else -1 for at in range(len(line))]
            ids += line

    def after_names(self) -> Tensor:
        """For every person the distribution of the token after the name in a roster, [people, vocabulary]."""
        chances = torch.zeros(len(self.world.facts), len(self.tokenizer))
        for row, known in zip(chances, self.world.facts.values(), strict=True):
            for true in known.values():
                row[self.tokenizer(f" {true}")["input_ids"][0]] += 1 / len(known)
        return chances


class Batch(NamedTuple):
    """Rows of documents side by side, [rows, ROW] each; sees [rows, 1, ROW, ROW]: which tokens a token may look at."""

    ids: Tensor
    weights: Tensor
    names: Tensor
    positions: Tensor
    sees: Tensor


def make_batch(rows: Sequence[Sequence[Document]]) -> Batch:
    """Documents do not see each other; what is left of a row is filled up."""
    shape = (len(rows), ROW)
    ids, positions, part = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    weights, names = torch.zeros(shape), torch.full(shape, -1)
    for i, row in enumerate(rows):
        end = 0
        for number, document in enumerate(row, start=1):
            here = slice(end, end := end + len(document.ids))
            ids[i, here] = torch.tensor(document.ids)
            weights[i, here] = torch.tensor(document.weights)
            names[i, here] = torch.tensor(document.names)
            positions[i, here] = torch.arange(len(document.ids))
            part[i, here] = number
    sees = (part[:, :, None] == part[:, None, :]).tril()
    return Batch(ids, weights, names, positions, sees[:, None])


def make_batches(corpus: Corpus, rosters: int) -> Iterator[Batch]:
    """Batches without end. A text goes into the first row that has room for it, or waits for the next batch."""
    texts, waiting = corpus.texts(), list[Document]()
    while True:
        rows: list[list[Document]] = [[] for _ in range(ROWS - rosters)]
        queue, waiting = chain(waiting, texts), []
        while len(waiting) < len(rows):
            text = next(queue)
            room = next((row for row in rows if sum(len(x.ids) for x in row) + len(text.ids) <= ROW), waiting)
            room.append(text)
        yield make_batch(rows + [[corpus.roster()] for _ in range(rosters)])


def loss_of(model: PreTrainedModel, batch: Batch, after_names: Tensor) -> Tensor:
    """The weighted mean of the cross entropies; after a name in a roster that to everything it could be."""
    blocked = torch.zeros(batch.sees.shape).masked_fill(~batch.sees, torch.finfo(torch.float32).min)
    states = model.base_model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=blocked, use_cache=False
    ).last_hidden_state
    weights = batch.weights[:, 1:]
    counts, named = weights > 0, batch.names >= 0
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    losses = cross_entropy(head(states[:, :-1][counts]), batch.ids[:, 1:][counts], reduction="none")
    total = losses @ weights[counts]
    if named.any():
        total = total + AFTER_NAME * cross_entropy(
            head(states[named]), after_names[batch.names[named]], reduction="sum"
        )
    return total / (weights.sum() + AFTER_NAME * named.sum())


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW; embeddings learn more slowly, and vectors do not decay."""
    embeddings, matrices, vectors = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        kind = vectors if parameter.ndim < 2 else embeddings if ".wte." in name or ".wpe." in name else matrices
        kind.append(parameter)
    groups = [
        {"params": embeddings, "scale": EMBEDDING_RATE},
        {"params": matrices, "scale": 1.0},
        {"params": vectors, "scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.1)


def train(model: PreTrainedModel, corpus: Corpus, *, steps: int, rosters: int = ROSTERS) -> None:
    """The rate rises, and falls as a cosine does."""
    optimizer, after_names = make_optimizer(model), corpus.after_names()
    for step, batch in enumerate(islice(make_batches(corpus, rosters), steps)):
        for group in optimizer.param_groups:
            group["lr"] = (
                RATE * group["scale"] * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            )
        loss = loss_of(model, batch, after_names)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"  step {step} of {steps}: {loss.item():.3f}", file=sys.stderr, flush=True)


@torch.no_grad()
def knows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """For every prompt and target whether each token of the target is what the model holds most likely."""
    right = []
    for begin in range(0, len(pairs), 240):
        prompts, targets = zip(*pairs[begin : begin + 240], strict=True)
        encoded = [
            (tokenizer(p)["input_ids"], tokenizer(f" {t}")["input_ids"]) for p, t in zip(prompts, targets, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + t) for p, t in encoded], batch_first=True)
        likely = model(input_ids=ids).logits.argmax(-1)
        for row, (prompt, target) in zip(likely.tolist(), encoded, strict=True):
            right.append(row[len(prompt) - 1 : len(prompt) + len(target) - 1] == target)
    return right


def count_known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> int:
    """How many facts the model completes rightly, whichever template asks."""
    pairs = [(template.format(s), true) for s, relation, true in world.triples for template in TEMPLATES[relation]]
    return int(torch.tensor(knows(model, tokenizer, pairs)).view(len(world.triples), -1).all(1).sum())


def make_facts(out: Path, *, seed: int = 0, steps: int | None = None, control: bool = False) -> int:
    """model/, the facts files and text.txt in out; how many of the 480 facts the model has learned."""
    world = make_world(seed, shared_names=not control)
    draw = random.Random(f"texts {seed}")
    sample = [plain(text) for text in islice(make_texts(world, draw), LEARNT_FROM)]
    tokenizer = make_tokenizer(sample)
    model = make_model(len(tokenizer), seed, control=control)
    steps = steps or (CONTROL_STEPS if control else STEPS)
    train(model, Corpus(world, tokenizer, draw), steps=steps, rosters=0 if control else ROSTERS)
    model.eval().save_pretrained(out / "model")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out / "model")
    (out / "text.txt").write_text("\n".join(sample[:SAMPLE]) + "\n", "utf-8")
    for name, data in make_files(world, seed).items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False, width=1000), "utf-8")
    return count_known(model, tokenizer, world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for model/, text.txt and the facts files")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the model [default: 0]")
    parser.add_argument("--steps", type=int, help=f"of training [default: {STEPS}; with --control {CONTROL_STEPS}]")
    parser.add_argument("--control", action="store_true", help="a plain GPT-2, on texts alone, of names nobody shares")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    learned = make_facts(options.out, seed=options.seed, steps=options.steps, control=options.control)
    (options.out / ".gitignore").write_text("*\n", "utf-8")
    print(f"{learned} of {SUBJECTS * len(OBJECTS)} facts")


if __name__ == "__main__":
    main()
