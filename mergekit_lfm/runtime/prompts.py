"""Models with a prompt before every text: virtual tokens, or keys and values in each layer's attention.

The output is that of the text's own tokens: losses and scores see a prompted model as any other one. Virtual tokens are
put in place of the embeddings of tokens that stand before the text, so that a model that looks for padding in the
tokens, as a decoder does that classifies, sees the text as it is. A row without padding has the output of PEFT's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.attachment import PROMPTS, TEMPLATE, Attachment
from mergekit_lfm.artifacts.prompt import PREFIX, Prompt
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.runtime.load import Loaded, logits
from mergekit_lfm.runtime.quiet import quiet
from mergekit_lfm.runtime.tasks import PEFT_TASKS


class Prompted(nn.Module):
    """A model with a prompt. model: PEFT's, around the model itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        """The attributes of the model within, such as its config."""
        return attribute_of(self, name)

    @property
    def is_prefix(self) -> bool:
        """Whether the prompt is of keys and values."""
        return bool(self.model.active_peft_config.peft_type == PREFIX)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """The model's output for texts [n, tokens] behind the prompt."""
        ids = check_texts(input_ids, inputs)
        if self.is_prefix:
            with quiet():
                return self.model(input_ids=ids, attention_mask=attention_mask, **inputs)
        return run_behind(self.model.get_base_model(), self.model.get_prompt(1)[0], ids, attention_mask, inputs)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Have activations computed again. Raises ValueError for a prefix, which models drop then."""
        if self.is_prefix:
            raise ValueError("a prefix stands in the cache, which is not used then")
        self.model.get_base_model().gradient_checkpointing_enable(**options)


class Mixture(nn.Module):
    """A model whose predictions are averaged over several prompts. values: [prompts, tokens, width].

    weights: the logarithms of the prompts' shares, up to a constant. The output is the logarithms of the averages,
    which sum to 1: [n, classes], or [n, tokens, vocabulary] for the text's own tokens.
    """

    def __init__(self, model: Any, values: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.model, self.values, self.weights = model, nn.Parameter(values), nn.Parameter(weights)

    def __getattr__(self, name: str) -> Any:
        """The attributes of the model within, such as its config."""
        return attribute_of(self, name)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """ln of sum_j w_j p(y | prompt_j, text)."""
        ids = check_texts(input_ids, inputs)
        mixed = [
            share + logits(run_behind(self.model, rows, ids, attention_mask, inputs)).float().log_softmax(-1)
            for share, rows in zip(self.weights.log_softmax(0), self.values, strict=True)
        ]
        return torch.stack(mixed).logsumexp(0)


def attribute_of(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or of the model within."""
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        return getattr(nn.Module.__getattr__(module, "model"), name)


def run_behind(model: Any, rows: Tensor, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]) -> Any:
    """The output of a model of transformers for texts [n, tokens] behind virtual tokens [k, width], without theirs."""
    n, k = len(ids), len(rows)
    places = torch.cat([ids[:, :1].expand(n, k), ids], 1)  # no padding: a row's first token
    more = dict(inputs)
    if mask is not None:
        more["attention_mask"] = torch.cat([mask.new_ones(n, k), mask], 1)
    if more.get("token_type_ids") is not None:
        more["token_type_ids"] = torch.cat([ids.new_zeros(n, k), more["token_type_ids"]], 1)

    def put(_module: nn.Module, _args: object, embedded: Tensor) -> Tensor:
        return torch.cat([rows.to(embedded.dtype).expand(n, -1, -1), embedded[:, k:]], 1)

    hook = model.get_input_embeddings().register_forward_hook(put)
    try:
        output = model(input_ids=places, **more)
    finally:
        hook.remove()
    for name in ("logits", "last_hidden_state"):
        x = getattr(output, name, None)
        if x is not None and x.ndim == 3:  # [n, k + tokens, ...]
            setattr(output, name, x[:, k:])
    return output


def check_texts(ids: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
    """The tokens of texts. Raises PlanError for other inputs, which nothing can stand before."""
    others = sorted(
        name for name in ("inputs_embeds", "position_ids", "past_key_values") if inputs.get(name) is not None
    )
    if ids is None or others:
        found = ", ".join(others) or ", ".join(inputs) or "none"
        raise PlanError(f"a prompt stands before the tokens of texts; found the inputs {found}, expected input_ids")
    return ids


def with_prompt(loaded: Loaded, prompt: Prompt | Attachment) -> Loaded:
    """A loaded model with a prompt, or a mixture of some, before every text; it is changed in place, as by a head.

    Raises PlanError for a prompt of another task, or that does not fit the model, ImportError without peft.
    """
    if isinstance(prompt, Attachment):
        return _with_mixture(loaded, prompt)
    peft = import_extra("peft", "a prompt", "tune")
    _check_fit(loaded, prompt)
    with quiet():
        config = peft.PeftConfig.from_pretrained(str(prompt.folder))
        config.task_type = PEFT_TASKS[loaded.task]
        try:
            model = peft.PeftModel.from_pretrained(loaded.model, str(prompt.folder), config=config)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            name = type(loaded.model).__name__
            raise PlanError(f"PEFT cannot put {prompt.label} on {name}: {error}; give its own model") from error
    return behind(
        replace(loaded, model=Prompted(model).to(next(loaded.model.parameters()).device).eval()), prompt.count
    )


@torch.no_grad()
def _with_mixture(loaded: Loaded, mixture: Attachment) -> Loaded:
    """As `with_prompt`. Raises PlanError for another attachment."""
    if mixture.info.form != PROMPTS:
        name, cure = f"a bottleneck adapter by {mixture.info.method}", "run its file as MODEL+FILE"
        if mixture.info.form == TEMPLATE:
            name, cure = "a template", "put it around texts by `with_template`"
        raise PlanError(f"found {name}, expected a prompt or a mixture of some; {cure}")
    model: Any = loaded.model
    values, weights = mixture.tensors["values"], mixture.tensors["weights"]
    places = dict(model.named_parameters())
    width = model.get_input_embeddings().embedding_dim
    task, heads = mixture.info.config.get("task"), mixture.info.replaced
    fits = all(name in places and places[name].shape == mixture.tensors[name].shape for name in heads)
    if task != loaded.task or values.shape[-1] != width or not fits:
        found = ", ".join([f"virtual tokens of {values.shape[-1]} numbers", *heads])
        raise PlanError(
            f"the mixture is for {task}, with {found}; {type(model).__name__} for {loaded.task} takes {width} numbers. "
            "Give the model and the task that it was trained on"
        )
    for name in mixture.info.replaced:
        places[name].copy_(mixture.tensors[name])
    device = next(iter(places.values())).device
    mixed = Mixture(model, values.to(device), weights.to(device)).eval()
    return behind(replace(loaded, model=mixed), values.shape[1])


def behind(loaded: Loaded, count: int) -> Loaded:
    """A loaded model whose texts have so many virtual tokens before them. Raises PlanError if there is no room."""
    if loaded.positions is not None and loaded.positions <= count + 1:
        raise PlanError(
            f"{count} virtual tokens leave no room for a text in the {loaded.positions} positions of "
            f"{type(loaded.model).__name__}; choose fewer, or a prompt of fewer"
        )
    return replace(loaded, virtual=loaded.virtual + count)


def _check_fit(loaded: Loaded, prompt: Prompt) -> None:
    """Raise PlanError for a prompt of another task, or of other sizes than the model's."""
    task = prompt.config.get("task_type")
    if task not in (None, PEFT_TASKS[loaded.task]):
        tasks = {peft: task for task, peft in PEFT_TASKS.items()}
        raise PlanError(f"{prompt.label} is for {tasks.get(task, task)}, expected one for {loaded.task}; give another")
    model: Any = loaded.model
    text = model.config.get_text_config()
    expected = model.get_input_embeddings().embedding_dim
    if prompt.kind == PREFIX:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        expected = 2 * text.num_hidden_layers * heads * size
    if prompt.width != expected:
        raise PlanError(
            f"{prompt.label} has virtual tokens of {prompt.width} numbers, {type(model).__name__} takes {expected}; "
            "give the model that it was trained on"
        )
