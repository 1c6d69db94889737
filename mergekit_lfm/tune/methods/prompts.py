"""Prompt tuning: virtual tokens before every text are trained, and the model stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mergekit_lfm.tune.work import Prepared, TuneWork

TOKENS = Parameter("tokens", 20, kind="int", minimum=1, doc="number of virtual tokens")
EARLIER = (
    "folders of prompts made earlier, with commas, the first made first: for prompt one to start from, for progressive "
    "those that stay"
)
START = Parameter("start", "", kind="str", doc="text whose tokens they are at first, by default random ones")


def soft(work: TuneWork) -> Prepared:
    """One vector for each virtual token. Source: Lester et al. 2021, arXiv 2104.08691, section 2.

    They start as tokens of the vocabulary, or as an earlier prompt: that is PPT, if the earlier one was trained on a
    task without labels. Source: Gu et al. 2021, arXiv 2109.04332, section 3.
    """
    model = _attach(work, work.integer("tokens"))
    _fill(model, _earlier(work) if work.files else first_values(work))
    return _prepared(model, work)


def encoded(work: TuneWork) -> Prepared:
    """The vectors as the output of a small network. Source: Liu et al. 2021, arXiv 2103.10385, section 3.2."""
    from mergekit_lfm.tune.peft_models import attach

    encoder = str(work.options["encoder"]).upper()

    def make(peft: Any) -> Any:
        return peft.PromptEncoderConfig(
            num_virtual_tokens=work.integer("tokens"), encoder_reparameterization_type=encoder
        )

    return _prepared(attach(work, make, "a model of texts"), work)


def prefix(work: TuneWork) -> Prepared:
    """Keys and values before those of each layer. Source: Li and Liang 2021, arXiv 2101.00190, sections 4.2 and 4.3."""
    from mergekit_lfm.tune.peft_models import attach

    def make(peft: Any) -> Any:
        return peft.PrefixTuningConfig(
            num_virtual_tokens=work.integer("tokens"), prefix_projection=work.options["projection"]
        )

    return _prepared(attach(work, make, "one whose attention takes a cache"), work)


def progressive(work: TuneWork) -> Prepared:
    """A new prompt before earlier ones, which stay. Source: Razdaibiedina et al. 2023, arXiv 2301.12314, section 3.

    The newest is first: [P_k, ..., P_1, text]. The prompt is trained as it is, without the authors' residual network.
    """
    import torch
    from torch import nn

    class Before(nn.Module):
        """The new vectors, before frozen ones."""

        earlier: Tensor

        def __init__(self, new: Tensor, earlier: Tensor) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(new), new.shape[1], _weight=new)
            self.register_buffer("earlier", earlier)

        def forward(self, _numbers: Tensor) -> Tensor:
            return torch.cat([self.embedding.weight, self.earlier])[None]

    new = first_values(work)
    earlier = torch.cat([values.to(new) for values in reversed(_read_earlier(work))])
    model = _attach(work, len(new) + len(earlier))
    model.prompt_encoder["default"] = Before(new, earlier)
    return _prepared(model, work)


def hard(work: TuneWork) -> Prepared:
    """Tokens of the vocabulary. Source: Wen et al. 2023, arXiv 2302.03668, algorithm 1.

    The model sees the token that is nearest to each vector, by the cosine, as in the authors' code; the gradient there
    moves the vector. Special tokens, and rows of the embedding without a token, are left out.
    """
    import torch
    from torch import nn

    tokenizer = work.tokenizer
    if tokenizer is None:
        raise PlanError("the model has no tokenizer, whose tokens pez chooses from; save one in its folder")
    embed = work.model.get_input_embeddings()  # type: ignore[operator]
    place = embed.weight.device
    known = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    ids = torch.tensor(sorted(each for each in known if each < embed.num_embeddings), device=place)
    with torch.no_grad():
        table = embed(ids).float()
    unit = nn.functional.normalize(table, dim=-1)

    class Nearest(nn.Module):
        """The tokens nearest to trained vectors."""

        def __init__(self, start: Tensor) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(start), start.shape[1], _weight=start)

        def numbers(self) -> Tensor:
            """Which rows of the table they are."""
            with torch.no_grad():
                return (nn.functional.normalize(self.embedding.weight, dim=-1) @ unit.T).argmax(-1)

        def forward(self, _numbers: Tensor) -> Tensor:
            moved = self.embedding.weight
            seen: Tensor = table[self.numbers()] + (moved - moved.detach())  # as the table has it, to the bit
            return seen[None]

    model = _attach(work, work.integer("tokens"))
    nearest = Nearest(first_values(work, among=ids))
    model.prompt_encoder["default"] = nearest

    def facts() -> dict[str, Any]:
        chosen = ids[nearest.numbers()].tolist()
        return {"text": tokenizer.decode(chosen), "token ids": chosen}

    return _prepared(model, work, facts)


def _attach(work: TuneWork, count: int) -> Any:
    """PEFT's model with so many virtual tokens."""
    from mergekit_lfm.tune.peft_models import attach

    return attach(work, lambda peft: peft.PromptTuningConfig(num_virtual_tokens=count), "a model of texts")


def _fill(model: Any, values: Tensor) -> None:
    """Give virtual tokens of PEFT's model these values."""
    import torch

    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(values)


def _prepared(model: Any, work: TuneWork, facts: Callable[[], dict[str, Any]] = dict) -> Prepared:
    """PEFT's model with a prompt, ready to be trained; the output is that of the texts' own tokens."""
    from mergekit_lfm.runtime.prompts import Prompted
    from mergekit_lfm.tune.peft_models import save_of
    from mergekit_lfm.tune.work import Prepared

    count = model.active_peft_config.num_virtual_tokens
    return Prepared(Prompted(model), adapter=save_of(model, work), virtual=count, facts=facts)


def _read_earlier(work: TuneWork) -> list[Tensor]:
    """The values of the prompts made earlier, [tokens, width]. Raises PlanError for those of other kinds and widths."""
    from mergekit_lfm.artifacts.prompt import SOFT, open_prompt

    width = work.model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    found: list[Tensor] = []
    for folder in work.files:
        prompt = open_prompt(folder)
        if prompt.kind not in SOFT or prompt.width != width:
            raise PlanError(
                f"{folder} is {prompt.kind} of width {prompt.width}, expected {' or '.join(SOFT)} of width {width}; "
                "give a prompt of this model"
            )
        found.append(prompt.read().float())
    return found


def _earlier(work: TuneWork) -> Tensor:
    """The values of an earlier prompt [tokens, width], to start from. Raises PlanError for another number of tokens."""
    count, text, found = work.integer("tokens"), work.options["start"], _read_earlier(work)
    sizes = [len(values) for values in found]
    if text or sizes != [count]:
        beside = f"start {text!r}" if text else f"tokens {count}"
        raise PlanError(
            f"found {beside} beside earlier prompts of {' and '.join(map(str, sizes))} tokens; expected one of "
            f"{count} tokens, which is the start, and no start text"
        )
    return found[0]


def first_values(work: TuneWork, among: Tensor | None = None) -> Tensor:
    """The first values of virtual tokens [tokens, width]: the embeddings of a text, or of random tokens.

    among: the tokens to choose from; by default all of the embedding. A text that is too short is repeated.
    """
    import torch

    count, text = work.integer("tokens"), str(work.options.get("start", ""))
    embed = work.model.get_input_embeddings()  # type: ignore[operator]
    if text:
        if work.tokenizer is None:
            raise PlanError("the model has no tokenizer, which the start text needs; save one in its folder")
        ids = work.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PlanError(f"start: found {text!r}, which has no token; give a text with some")
        chosen = torch.tensor((ids * count)[:count])
    else:
        pool = torch.arange(embed.num_embeddings) if among is None else among.cpu()
        chosen = pool[torch.randint(len(pool), (count,))]
    with torch.no_grad():
        values: Tensor = embed(chosen.to(embed.weight.device)).float().clone()
    return values


METHODS = (
    TuneMethod(
        "prompt",
        "Lester et al. 2021, arXiv 2104.08691",
        "virtual tokens before every text, as a prompt",
        "prompt",
        soft,
        1e-2,
        (TOKENS, START, Parameter("earlier", "", kind="str", unset="none", doc=EARLIER)),
        files="earlier",
    ),
    TuneMethod(
        "p_tuning",
        "Liu et al. 2021, arXiv 2103.10385",
        "virtual tokens that a small network makes, as a prompt",
        "prompt",
        encoded,
        1e-3,
        (TOKENS, Parameter("encoder", "mlp", kind="str", choices=("mlp", "lstm"), doc="the network")),
    ),
    TuneMethod(
        "prefix",
        "Li and Liang 2021, arXiv 2101.00190",
        "keys and values before those of each layer's attention, as a prompt",
        "prompt",
        prefix,
        1e-3,
        (TOKENS, Parameter("projection", True, kind="bool", doc="train them as the output of a small network")),
    ),
    TuneMethod(
        "progressive",
        "Razdaibiedina et al. 2023, arXiv 2301.12314",
        "virtual tokens before those of earlier prompts, which stay, as a prompt",
        "prompt",
        progressive,
        1e-2,
        (TOKENS, Parameter("earlier", None, kind="str", unset="required", doc=EARLIER)),
        files="earlier",
    ),
    TuneMethod(
        "pez",
        "Wen et al. 2023, arXiv 2302.03668",
        "words: virtual tokens that are tokens of the vocabulary, as a prompt",
        "prompt",
        hard,
        1e-1,
        (TOKENS, START),
    ),
)
