"""Let a language model continue texts by itself: greedily, until it stops or has said enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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
            said |= zip(chunk, _continue(model, [rows[i] for i in chunk], room, ended), strict=True)
            if progress is not None:
                progress(len(said), len(rows))
    return [said[i] for i in range(len(rows))]


def _continue(
    model: nn.Module, rows: Sequence[Sequence[int]], most: int, ended: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """The tokens after each of several rows of one length."""
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    stops, said, going = stop_tokens(model), [list[int]() for _ in rows], [True] * len(rows)
    inputs: dict[str, Any] = {"input_ids": ids}
    for _ in range(most):
        with torch.no_grad():
            output = run(model, kwargs={**inputs, "use_cache": True})
        tokens: Tensor = logits(output)[:, -1].argmax(-1)
        for i, token in enumerate(tokens.cpu().tolist()):
            going[i] = going[i] and token not in stops
            if going[i]:
                said[i].append(token)
                going[i] = not ended(said[i])
        if not any(going):
            break
        ids = torch.cat([ids, tokens[:, None]], 1)
        name = next((each for each in STATES if getattr(output, each, None) is not None), None)
        inputs = {"input_ids": ids} if name is None else {"input_ids": ids[:, -1:], name: getattr(output, name)}
    return said
