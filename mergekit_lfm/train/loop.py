"""`fit`: train a model. One loop for every way of tuning, distilling and meta-learning that goes by gradients.

The batch of a step, its random numbers and its rate depend on the seed and the step alone, so that a training that was
killed goes on from its last state to the same bytes, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.machine.pauses import Pauses, delay_interrupts
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Batches, seed_of
from mergekit_lfm.train.hooks import Hook
from mergekit_lfm.train.losses import Loss
from mergekit_lfm.train.optimizer import make_optimizer
from mergekit_lfm.train.processes import current_group
from mergekit_lfm.train.state import Looked, State

STATE = "state.safetensors"
PACE = 50  # steps by which the time left is estimated

Tell = Callable[[int, int, Mapping[str, Any]], None]  # steps done, of all, and the last line of the record


@dataclass(frozen=True, slots=True)
class History:
    """The course of a training. steps: those done; record: a line for each.

    best: the least loss on the development set, after `best_step` steps; None without the set.
    """

    steps: int
    record: tuple[Mapping[str, Any], ...]
    best: float | None = None
    best_step: int | None = None

    @property
    def loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        last = self.record[-max(1, len(self.record) // 10) :]
        return float(sum(line["loss"] for line in last) / len(last))


def fit(
    model: nn.Module,
    examples: Batches,
    loss: Loss,
    options: Options,
    *,
    dev: Batches | None = None,
    hooks: Sequence[Hook] = (),
    place: Path | None = None,
    request: str = "",
    pauses: Pauses | None = None,
    tell: Tell | None = None,
) -> History:
    """Train the parameters of a model that require gradients, in place, by AdamW or plain descent.

    dev: a development set: the parameters with the least loss on it are those that stay. place: a folder for the state,
    which is saved at `pauses` and on Ctrl-C, and for the metrics, a line of JSON for each step; request: what is being
    made, so that a state of something else is not gone on from. The model is in evaluation mode afterwards. Several
    processes of torch.distributed share the examples of each step, and the first one alone writes.

    Raises PlanError if nothing is trained, and for a loss that is not finite, with the step; the state before that is
    saved. Source of AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    if not parameters:
        raise PlanError("no parameter of the model is trained; choose a method that trains some")
    if dev is not None and any(hook.replaces for hook in hooks):
        raise PlanError("a hook puts other weights in place of those that the development set chose; leave one out")
    request = request or repr((examples.digest, dev and dev.digest, options))
    state = State(model, parameters, make_optimizer(parameters, options), tuple(hooks))
    _begin(state, place, request)
    pauses, group, device = pauses or Pauses(), current_group(), next(iter(parameters.values())).device
    group.check_same(device, state.done, options.batch_size)
    file, tell = (None, None) if group.rank else (None if place is None else place / STATE, tell)
    with _training(model, options), delay_interrupts() as interrupted, _random(device):
        while state.done < options.steps and not _is_over(state.looked, options):
            begun = time.monotonic()
            line = _step(state, examples, loss, options, file, request)
            line["per_second"] = round(line["tokens"] / max(time.monotonic() - begun, 1e-9), 1)
            if dev is not None and _is_look(state.done, options):
                line["dev_loss"] = _look(state, dev, loss, options)
            state.record.append(line | _times(time.monotonic() - begun, state, options))
            if tell is not None:
                tell(state.done, options.steps, state.record[-1])
            stops = sum(group.add(device, interrupted())) > 0
            if file is not None and (pauses.due or stops):
                with pauses.taken():
                    state.save(file, request)
            if stops:
                raise KeyboardInterrupt
    _keep_best(state)
    for hook in hooks:
        hook.finish(parameters)
    if file is not None:
        state.save(file, request)
    best = state.looked
    return History(state.done, tuple(state.record), best.best, None if best.best is None else best.best_step)


def _begin(state: State, place: Path | None, request: str) -> None:
    """Begin with the hooks, and go on from the state in a folder if it is of this request."""
    for hook in state.hooks:
        hook.begin(state.parameters)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        state.restore(place / STATE, request)


def _times(seconds: float, state: State, options: Options) -> dict[str, float]:
    """The time of a step for its line, and the seconds left by the pace of the last steps."""
    last = [*(each["seconds"] for each in state.record[-PACE:]), seconds]
    left = (options.steps - state.done) * sum(last) / len(last)
    return {"seconds": round(seconds, 4), "seconds_left": round(left, 4)}


@contextmanager
def _training(model: nn.Module, options: Options) -> Iterator[None]:
    """The model in the mode of training, but for batch normalisation; in evaluation mode afterwards."""
    if options.checkpointing:
        _recompute(model, True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if options.checkpointing:
            _recompute(model, False)
        model.eval()


def _recompute(model: Any, on: bool) -> None:
    """Have a model of transformers compute activations again, or not. Raises PlanError if it cannot."""
    try:
        with warnings.catch_warnings():  # of a new name in transformers
            warnings.simplefilter("ignore")
            if on:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
    except (AttributeError, ValueError) as error:
        name = type(model).__name__
        raise PlanError(
            f"checkpointing: {name} cannot compute activations again ({reason(error)}); leave it out"
        ) from None


@contextmanager
def _random(device: torch.device) -> Iterator[None]:
    """Torch's random numbers are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _autocast(device: torch.device, options: Options) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if options.autocast else nullcontext()


def _step(
    state: State, examples: Batches, loss: Loss, options: Options, file: Path | None, request: str
) -> dict[str, Any]:
    """One step of the optimizer; its line of the record."""
    step, model, group = state.done, state.model, current_group()
    torch.manual_seed(seed_of(options.seed, "step", step, *([group.rank] if group.rank else [])))
    for hook in state.hooks:
        hook.before(step, state.parameters)
    numbers = group.share(examples.step(step, options.batch_size, options.seed))
    draw = seed_of(options.seed, "draw", step)
    device = next(iter(state.parameters.values())).device
    size = math.ceil(len(numbers) / options.accumulate)
    total, count, tokens = 0.0, 0.0, 0.0
    seen = [] if file is None else [(x, x.detach().clone()) for x in model.buffers()]  # a loss may count in them
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    whole = len(parts) == group.count == 1
    for part in parts:
        batch = {name: x.to(device, non_blocking=True) for name, x in examples.batch(part, draw).items()}
        with _autocast(device, options):
            terms = loss(model, batch)
        tokens += _tokens(batch)
        count += terms.number
        value = terms.total
        if terms.number and not value.requires_grad:
            raise PlanError(
                f"the loss of step {step + 1} depends on no parameter that is trained; train others, or choose other "
                "terms of the loss, or other layers"
            )
        if terms.number:
            (value / terms.number if whole else value).backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    total, count, tokens = group.add(device, total, count, tokens)
    mean = total / max(1, count)
    if math.isfinite(mean):
        group.add_gradients(state.parameters)
    norm = _correct(state, 1 if whole else count, options) if math.isfinite(mean) else math.inf
    if not math.isfinite(norm):
        state.optimizer.zero_grad()
        if file is not None:
            with torch.no_grad():
                for x, value in seen:
                    x.copy_(value)
            state.save(file, request)
        where = f" The state before it is in {file}" if file is not None else ""
        found = f"the loss of step {step + 1} is {mean}" + (
            ", and its gradient is not finite" if mean < math.inf else ""
        )
        raise PlanError(f"{found}, expected finite numbers; {_cure(options)}.{where}")
    for settings in state.optimizer.param_groups:
        settings["lr"] = settings["share"] * options.rate(step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if not bool(torch.stack([x.isfinite().all() for x in torch._foreach_norm([*state.parameters.values()])]).all()):
        raise PlanError(f"step {step + 1} makes parameters that are not finite; {_cure(options)}")
    state.done = step + 1
    for hook in state.hooks:
        hook.after(state.done, state.parameters)
    return {"step": state.done, "loss": mean, "learning_rate": options.rate(step), "tokens": int(tokens)}


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch without padding, or its examples where it has no tokens."""
    masks = [x for name, x in batch.items() if name.endswith("attention_mask") and not name.startswith("pixel")]
    return sum(int(mask.sum()) for mask in masks) if masks else len(next(iter(batch.values())))


def _cure(options: Options) -> str:
    return f"choose a lower learning rate than {options.learning_rate:g}, or look for the cause in the data"


def _correct(state: State, count: float, options: Options) -> float:
    """Divide the gradients, of a loss that is a sum of `count` terms, and clip them; their norm before that."""
    if count > 1:
        torch._foreach_div_([x.grad for x in state.parameters.values() if x.grad is not None], count)
    for hook in state.hooks:
        hook.correct(state.parameters)
    return float(torch.nn.utils.clip_grad_norm_(state.parameters.values(), options.clip or math.inf))


def _is_look(done: int, options: Options) -> bool:
    return done == options.steps or (options.evaluate_every is not None and done % options.evaluate_every == 0)


def _is_over(looked: Looked, options: Options) -> bool:
    return options.patience is not None and looked.waits >= options.patience


def _look(state: State, dev: Batches, loss: Loss, options: Options) -> float:
    """The loss on the development set; keeps the parameters if it is the least so far."""
    value = mean_loss(state.model, dev, loss, options)
    if not math.isfinite(value):
        raise PlanError(f"the loss on the development set is {value} after step {state.done}; {_cure(options)}")
    looked = state.looked
    if looked.best is None or value < looked.best:
        state.looked = Looked(value, state.done, 0)
        state.kept = {name: x.detach().clone() for name, x in state.parameters.items()}
    else:
        state.looked = Looked(looked.best, looked.best_step, looked.waits + 1)
    return value


def mean_loss(model: nn.Module, examples: Batches, loss: Loss, options: Options) -> float:
    """The mean loss over all examples, in evaluation mode; the model's mode is as before afterwards.

    Several processes share the examples, and have the same mean.
    """
    was, total, count, group = model.training, 0.0, 0, current_group()
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), _autocast(device, options):
        size = max(1, options.batch_size // options.accumulate)
        for batch in islice(examples.in_order(size), group.rank, None, group.count):
            terms = loss(model, {name: x.to(device) for name, x in batch.items()})
            total, count = total + float(terms.total), count + terms.number
    model.train(was)
    total, terms_in_all = group.add(device, total, count)
    return total / max(1, terms_in_all)


@torch.no_grad()
def _keep_best(state: State) -> None:
    for name, x in state.kept.items():
        state.parameters[name].copy_(x)
