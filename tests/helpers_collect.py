"""Tiny models of many kinds with data for them, and their statistics by the plainest code, in float64."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergekit_lfm.runtime.batches import Batch

VOCABULARY, WIDTH = 29, 8


@dataclass(frozen=True)
class Case:
    """A model, a maker of its data in batches of n, and its task."""

    model: nn.Module
    data: Callable[[Sequence[int]], list[Batch]]
    task: Any = "classification"


class Tied(nn.Module):
    """A language model whose head is its embedding, and which uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + torch.tanh(self.block(x).cumsum(1))
        logits: Tensor = self.head(self.norm(self.block(x)))
        return logits


class OutOfSight(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.second = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        logits: Tensor = self.second(h) + h @ self.first.weight
        return logits


class Positions(nn.Module):
    """Adds its own parameters to all examples, and returns a vector for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(16, WIDTH)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1])[None])
        x = torch.sin(x + self.shift)
        vectors: Tensor = self.out(x).mean(1)
        return vectors


def arrays(*shape: int, labels: int = 0, seed: int = 5) -> Callable[[Sequence[int]], list[Batch]]:
    """Random inputs of a shape; with labels, one of `classes` for each."""

    def batches(sizes: Sequence[int]) -> list[Batch]:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(sizes), *shape, generator=random, dtype=torch.float64)
        y = torch.randint(labels, (sum(sizes),), generator=random) if labels else None
        return cut(sizes, lambda rows: Batch(tuple(rows), (x[rows],), {}, None if y is None else y[rows]))

    return batches


def texts(length: int, seed: int = 6, labels: int = 0) -> Callable[[Sequence[int]], list[Batch]]:
    """Random tokens; with labels, one of `classes` for each text."""

    def batches(sizes: Sequence[int]) -> list[Batch]:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCABULARY, (sum(sizes), length), generator=random)
        y = torch.randint(labels, (sum(sizes),), generator=random) if labels else None
        return cut(sizes, lambda rows: Batch(tuple(rows), (), {"input_ids": ids[rows]}, None if y is None else y[rows]))

    return batches


def cut(sizes: Sequence[int], make: Callable[[list[int]], Batch]) -> list[Batch]:
    """Batches of the given sizes, with the examples in order."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [make(list(range(begin, end))) for begin, end in pairwise(ends)]


def mlp(*widths: int, seed: int = 1) -> nn.Sequential:
    """Linear layers with tanh in between, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for one, two in pairwise(widths):
        layers += [nn.Linear(one, two), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def convolutional() -> nn.Module:
    """Convolutions, batch norm with statistics, ReLU in place."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, groups=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()
    for x in model[1].buffers():
        x.copy_(torch.rand_like(x, dtype=torch.float64) + 0.5)
    return model


def transformer(kind: str, seed: int = 3) -> nn.Module:
    """A tiny model of transformers in float64: "llama", "gpt2", "bert" (a classifier) or "encoder"."""
    import transformers

    small: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    if kind == "llama":
        llama = transformers.LlamaConfig(**small, num_key_value_heads=1, initializer_range=0.3, bos_token_id=0)
        return transformers.LlamaForCausalLM(llama).double()
    if kind == "gpt2":
        heads: dict[str, Any] = {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **heads)
        return transformers.GPT2LMHeadModel(gpt2).double()
    config = transformers.BertConfig(**small | {"num_labels": 3}, initializer_range=0.3, pad_token_id=3)
    if kind == "bert":
        return transformers.BertForSequenceClassification(config).double()
    return transformers.BertModel(config).double()


def image_model(kind: str, seed: int = 3) -> nn.Module:
    """A fresh classifier of images in float64, "vit", "dinov2" or "beit", whose layers have other names on disk."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
    prefix = {"vit": "ViT", "dinov2": "Dinov2", "beit": "Beit"}[kind]
    inner = {} if kind == "dinov2" else {"intermediate_size": 24}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**sizes, **inner)
    model: nn.Module = getattr(transformers, f"{prefix}ForImageClassification")(config)
    return model.double()


def brute_force_fisher(
    model: nn.Module, batches: Sequence[Batch], scalars: Callable[[Any, Batch], Sequence[tuple[float | Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """1/N sum_n sum_k w_k (d s_k / d theta)^2, (w, s) = scalars(output, example), an example and a score at a time."""
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count = 0
    for batch in batches:
        for i in range(len(batch)):
            one = Batch(
                batch.indices[i : i + 1],
                tuple(x[i : i + 1] for x in batch.args),
                {name: x[i : i + 1] for name, x in batch.kwargs.items()},
                None if batch.labels is None else batch.labels[i : i + 1],
            )
            count += 1
            for weight, score in scalars(model(*one.args, **one.kwargs), one):
                grads = torch.autograd.grad(score, list(parameters.values()), retain_graph=True, allow_unused=True)
                for total, grad in zip(found.values(), grads, strict=True):
                    if grad is not None:
                        total += float(weight) * grad.detach() ** 2
    return {name: total / count for name, total in found.items()}


def expected_classes(output: Any, _example: Batch) -> list[tuple[Tensor, Tensor]]:
    """(p_y, log p_y) for every class y."""
    log_p = getattr(output, "logits", output)[0].log_softmax(-1)
    return [(score.detach().exp(), score) for score in log_p]


def true_tokens(output: Any, example: Batch) -> list[tuple[float, Tensor]]:
    """log p of the sequence, token by token."""
    (ids,) = example.kwargs["input_ids"]
    log_p = getattr(output, "logits", output)[0].log_softmax(-1)
    return [(1.0, sum((log_p[t, ids[t + 1]] for t in range(len(ids) - 1)), torch.tensor(0.0)))]


# ------------------------------------------------------------------ runs that are killed


def killed_job(kind: str, out: Path) -> None:
    """Runs of several passes, each ended by Ctrl-C after a batch, which keeps the sums; the last one completes."""
    from mergekit_lfm.collect.run import collect

    def press(done: int, _total: int) -> None:
        if done % 6 in (3, 5):
            os.kill(os.getpid(), signal.SIGINT)

    memory = {"gram": 8 * 8**2 + 8 * 7**2, "cross": 8 * (7 * 7 + 14) + 900, "fisher": 8 * 7 * 7}[kind]
    other = {"other": mlp(6, 7, 5, 3, seed=2)} if kind == "cross" else {}
    batches = arrays(6)([3, 2, 1])
    while True:
        with suppress(KeyboardInterrupt):
            collect(kind, mlp(6, 7, 5, 3), batches, out, memory=memory, progress=press, **other)  # type: ignore[arg-type]
            return


def kill_everywhere(kind: str, folder: Path, step: int) -> dict[str, Any]:
    """Kill the job at every step-th system call and run it again; the number of calls, and the wrong results."""
    import helpers_faults

    import mergekit_lfm.collect.run  # noqa: F401  # once, for all children

    helpers_faults.spare_syncs()
    gc.collect()
    gc.freeze()  # or each child's collector would copy every page of this process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background

    def forked(**fault: Any) -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with (folder / "calls").open("w") as trace:
            helpers_faults.Injector(helpers_faults.Fault(**fault), trace).install()
            killed_job(kind, folder / "out.safetensors")
        os._exit(0)

    assert forked() == 0
    expected = (folder / "out.safetensors").read_bytes()
    calls = len((folder / "calls").read_text().splitlines())
    wrong: list[tuple[int, str]] = []
    for number, moment in enumerate(range(1, calls + 1, step)):
        (folder / "out.safetensors").unlink(missing_ok=True)
        code = forked(kill_at=moment, torn=number % 2 == 0, lose_unsynced=number % 3 == 0)
        if code != -signal.SIGKILL:
            wrong.append((moment, f"exit code {code}"))
        resumed = forked()
        left = sorted(path.name for path in folder.iterdir())
        if resumed or left != ["calls", "out.safetensors"]:
            wrong.append((moment, f"exit code {resumed}, left {left}"))
        elif (folder / "out.safetensors").read_bytes() != expected:
            wrong.append((moment, "another file"))
    return {"calls": calls, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_everywhere(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
