"""Let a language model continue texts by itself, until it stops or has said enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import FormatError, reason
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.load import logits, run

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

STATES = (
    "cache",
    "past_key_values",
)  # the name of a model's states of earlier tokens, since transformers 5.24 and before


class Said(NamedTuple):
    """The tokens after a row, without one that ends the text. ended: whether the model ended it by itself."""

    tokens: list[int]
    ended: bool


def most_likely(scores: Tensor) -> Tensor:
    """The most likely token of each row of scores [n, vocabulary], the first among equals."""
    return scores.argmax(-1)


def stop_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens by which the model ends a text, as its generation config, or else its config, names them."""
    ends = (getattr(getattr(model, name, None), "eos_token_id", None) for name in ("generation_config", "config"))
    end: Any = next((each for each in ends if each is not None), ())
    return frozenset(end if isinstance(end, list | tuple) else [end])


def chat_tokens(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The tokens of a text as a user's words in a chat, up to the answer; None for a model without such a form."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": text}]
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise FormatError(
            f"the tokenizer's chat template does not take a question ({reason(error)}); expected one that takes a "
            "single message of the user. Correct or remove chat_template"
        ) from error
    return list(ids)


def generate(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    most: int,
    *,
    batch: int = 32,
    limit: int | None = None,
    ended: Callable[[Sequence[int]], bool],
    progress: Count | None = None,
) -> list[list[int]]:
    """The most likely tokens after each row, one after another, at most `most`, without one that ends the text.

    Rows of one length run together, so that none is padded: not every architecture takes positions. limit: the most
    tokens that the model takes. ended: True for tokens that need no more. progress: called with (rows done, all rows).
    The model should be in evaluation mode.
    """
    lengths = defaultdict[int, list[int]](list)
    for i, row in enumerate(rows):
        lengths[len(row)].append(i)
    said: dict[int, list[int]] = {}
    for length, same in sorted(lengths.items()):
        room = most if limit is None else min(most, limit - length)
        for start in range(0, len(same), batch):
            chunk = same[start : start + batch]
            own = continue_rows(model, [rows[i] for i in chunk], room, stops=stop_tokens(model), enough=ended)
            said |= zip(chunk, (each.tokens for each in own), strict=True)
            if progress is not None:
                progress(len(said), len(rows))
    return [said[i] for i in range(len(rows))]


def continue_rows(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    most: int,
    *,
    stops: Collection[int],
    pick: Callable[[Tensor], Tensor] = most_likely,
    start: Sequence[int] | None = None,
    enough: Callable[[Sequence[int]], bool] = lambda _: False,
    tell: Callable[[int], None] = lambda _: None,
) -> list[Said]:
    """The tokens after each of several rows of one length, at most `most`.

    stops: tokens that end a text. pick: from scores [n, vocabulary] to a token of each row. start: the first tokens of
    a decoder, whose encoder reads the rows; None for a model without. enough: True for tokens that need no more. tell:
    called with the number of new tokens. The number of rows is the same at each step, also when some have ended.
    """
    device = next(model.parameters()).device
    # The scores of a long prompt would take gigabytes.
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    ids, name, read = torch.tensor(rows, device=device), "input_ids", dict[str, Any]()
    if start is not None:
        ids, name, read = torch.tensor([[*start]] * len(rows), device=device), "decoder_input_ids", {"input_ids": ids}
    said, going, ended = [list[int]() for _ in rows], [True] * len(rows), [False] * len(rows)
    inputs: dict[str, Any] = {name: ids}
    for _ in range(most):
        with torch.no_grad():
            output = run(model, kwargs={**read, **inputs, **last, "use_cache": True})
        tokens = pick(logits(output)[:, -1]).to(device)  # [n]
        new = 0
        for i, token in enumerate(tokens.cpu().tolist()):
            ended[i] = ended[i] or (going[i] and token in stops)
            going[i] = going[i] and not ended[i]
            if going[i]:
                said[i].append(token)
                new += 1
                going[i] = not enough(said[i])
        tell(new)
        if not any(going):
            break
        ids = torch.cat([ids, tokens[:, None]], 1)
        states = next((each for each in STATES if getattr(output, each, None) is not None), None)
        inputs = {name: ids} if states is None else {name: ids[:, -1:], states: getattr(output, states)}
        if start is not None:
            read = {"encoder_outputs": (output.encoder_last_hidden_state,)}
    return [Said(*each) for each in zip(said, ended, strict=True)]
