"""Masked language models as classifiers: a text in a template with places, and the words that the model has for them.

The other words of the template are vectors, which stand in place of their embeddings and may be trained. The output is
that of a classifier, so that losses and scores see a templated model as any other one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mergekit_lfm.artifacts.attachment import TEMPLATE, Attachment
from mergekit_lfm.artifacts.rules import PLACE, Rules, make_rules
from mergekit_lfm.errors import FormatError, PlanError, shorten
from mergekit_lfm.runtime.data import frame_of
from mergekit_lfm.runtime.load import Loaded, logits, tokenizer_for_texts
from mergekit_lfm.runtime.prompts import attribute_of, behind, check_texts

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer


@dataclass(frozen=True)
class Layout:
    """Rules in the tokens of a model.

    frame: how many special tokens are before a text, and after it. before, after: the template's tokens on each side of
    the text, inside of these. mask: the token of a place. words: for each place the tokens that classes have there.
    classes: for each place the number of each class's word among these.
    """

    frame: tuple[int, int]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int
    words: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many tokens the template adds to a text."""
        return len(self.before) + len(self.after)

    @property
    def soft(self) -> list[int]:
        """The tokens of the template that are not places, whose embeddings are vectors of its own."""
        return [token for token in (*self.before, *self.after) if token != self.mask]

    def fill(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """A text [tokens] in the template, and for each token its number: vectors from 1, places from -1, others 0."""
        first, last = self.frame
        last = len(row) - last
        sides = [torch.tensor(side, dtype=row.dtype, device=row.device) for side in (self.before, self.after)]
        tokens = torch.cat([row[:first], sides[0], row[first:last], sides[1], row[last:]])
        added = torch.tensor([token == self.mask for token in (*self.before, *self.after)], device=row.device)
        numbers = torch.where(added, -added.cumsum(0), (~added).cumsum(0))
        start, plain = len(self.before), torch.zeros_like(row)
        return tokens, torch.cat([plain[:first], numbers[:start], plain[first:last], numbers[start:], plain[last:]])


def lay_out(rules: Rules, tokenizer: Tokenizer | None) -> Layout:
    """Rules in the tokens of a model.

    Raises PlanError for a tokenizer without a mask, for words that are not one token, and for a template without words.
    """
    tokenizer = tokenizer_for_texts(tokenizer)
    mask = tokenizer.mask_token_id
    if mask is None:
        raise PlanError("the tokenizer has no mask, which stands in a template's places; give a masked language model")
    sides = [side.replace(PLACE, str(tokenizer.mask_token)) for side in rules.sides]
    before, after = (tokenizer(side, add_special_tokens=False, verbose=False)["input_ids"] for side in sides)
    tokens = {word: _tokens_of(word, tokenizer) for words in rules.words for word in words}
    if wrong := [f"{word!r}, {len(ids)} tokens" for word, ids in tokens.items() if len(ids) != 1]:
        raise PlanError(f"words of classes: found {shorten(wrong, 5)}; expected words that are one token each")
    words = tuple(tuple(tokens[word][0] for word in own) for own in rules.words)
    if same := [own for own, ids in zip(rules.words, words, strict=True) if len({*ids}) < len(ids)]:
        raise PlanError(f"words of classes: found {shorten(same[0], 5)}, where two are one token; give others")
    chosen = zip(*rules.classes, strict=True)
    classes = tuple(tuple(map(own.index, each)) for own, each in zip(rules.words, chosen, strict=True))
    start, _, end = frame_of("a", tokenizer)
    layout = Layout((len(start), len(end)), tuple(before), tuple(after), mask, words, classes)
    if not layout.soft:
        raise PlanError(f"template: found {rules.template!r} without words; expected some, which are trained")
    return layout


def _tokens_of(word: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a word behind a space, or of the word alone if that is one token; none for an unknown one."""
    forms = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (f" {word}", word)]
    ids: list[int] = next((each for each in forms if len(each) == 1), forms[0])
    return [] if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else ids


class Templated(nn.Module):
    """A masked language model as a classifier by rules. values: the vectors of the template's words, [words, width].

    The output is [n, classes]: the sum over places of ln p of the class's word, among the words that classes have
    there. The model's config has this number of classes. Source: Han et al. 2021, arXiv 2105.11259, section 3.
    """

    def __init__(self, model: Any, layout: Layout, values: Tensor) -> None:
        super().__init__()
        self.model, self.layout, self.values = model, layout, nn.Parameter(values)
        model.config.num_labels = len(layout.classes[0])

    def __getattr__(self, name: str) -> Any:
        """The attributes of the model within, such as its config."""
        return attribute_of(self, name)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The scores of the classes for texts [n, tokens], which have their special tokens."""
        ids = check_texts(input_ids, inputs)
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        filled = [self.layout.fill(row[mask.bool()]) for row, mask in zip(ids, real, strict=True)]
        padding = self.model.config.pad_token_id or 0
        rows = pad_sequence([tokens for tokens, _ in filled], batch_first=True, padding_value=padding)
        numbers = pad_sequence([own for _, own in filled], batch_first=True)
        mask = pad_sequence([torch.ones_like(own) for _, own in filled], batch_first=True)
        scores = self._run(rows, numbers, mask)
        total = torch.zeros((), device=scores.device)
        for place, (words, own) in enumerate(zip(self.layout.words, self.layout.classes, strict=True), 1):
            logs = scores[numbers == -place][:, [*words]].log_softmax(-1)  # [n, words]
            total = total + logs[:, [*own]]
        return total

    def _run(self, rows: Tensor, numbers: Tensor, mask: Tensor) -> Tensor:
        """The scores of all tokens [n, tokens, vocabulary], in float32 or more."""

        def put(_module: nn.Module, _args: object, embedded: Tensor) -> Tensor:
            own = self.values.to(embedded.dtype)[(numbers - 1).clamp(min=0)]
            return torch.where((numbers > 0)[..., None], own, embedded)

        hook = self.model.get_input_embeddings().register_forward_hook(put)
        try:
            scores = logits(self.model(input_ids=rows, attention_mask=mask))
        finally:
            hook.remove()
        return scores if scores.dtype == torch.float64 else scores.float()


def first_vectors(model: Any, layout: Layout) -> Tensor:
    """The embeddings of the template's words, [words, width]."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        values: Tensor = embed(torch.tensor(layout.soft, device=embed.weight.device)).clone()
    return values


def with_template(loaded: Loaded, template: Attachment) -> Loaded:
    """A loaded masked language model as the classifier that a template makes of it.

    Raises PlanError for a template that does not fit the model, FormatError for a damaged one.
    """
    if template.info.form != TEMPLATE or loaded.task != "masked_lm":
        found = f"{template.info.form} for {loaded.task}"
        raise PlanError(f"found {found}; expected a template by ptr for a masked language model. Give these")
    model: Any = loaded.model
    layout = lay_out(make_rules(template.info.config, "the template"), loaded.tokenizer)
    values = template.tensors.get("values")
    width = model.get_input_embeddings().embedding_dim
    if values is None or values.shape != (len(layout.soft), width):
        found = "no vectors" if values is None else f"vectors {list(values.shape)}"
        raise FormatError(
            f"the template has {found}; with this model's tokens it has {len(layout.soft)} words of {width} numbers. "
            "Give the model that it was trained on"
        )
    templated = Templated(model, layout, values.to(next(model.parameters()))).eval()
    return behind(replace(loaded, model=templated, task="classification"), layout.count)
