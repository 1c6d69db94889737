"""A making of images, and of a student that learns from them, step by step. A killed run goes on from its state.

Random numbers need no state: each step draws from seeds of its own. So a step that an earlier run has done is counted,
and all that it left is in the state's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_lfm.machine.pauses import Pauses, delay_interrupts
from mergekit_lfm.train.hooks import Hook
from mergekit_lfm.train.loop import STATE
from mergekit_lfm.train.state import State


class _Memory(Hook):
    """Tensors of any shapes by name."""

    def restore(self, memory: Mapping[str, Tensor]) -> None:
        self.memory = dict(memory)


class Making:
    """The steps so far, by this run and earlier ones: gradients of images, rounds of a generator, a student's.

    place: a folder for the state, which is saved at `pauses` and on Ctrl-C; None keeps none. request: all that decides
    the result, so that a state of something else is not gone on from. A module, or images, must be held before the
    first step that changes them.
    """

    def __init__(self, place: Path | None = None, request: str = "", pauses: Pauses | None = None) -> None:
        self._file, self._request, self._pauses = None if place is None else place / STATE, request, pauses or Pauses()
        self._memory, self._at = _Memory(), 0
        self._moments = torch.optim.Optimizer([torch.empty(0)], {})  # makes no steps; keeps the moments of the others
        self._state = State(nn.Module(), {}, self._moments, [self._memory])
        self._interrupted: Callable[[], bool] = lambda: False
        self._go_on()

    @property
    def record(self) -> list[dict[str, float]]:
        """A line for each step."""
        return [{name: x for name, x in line.items() if name != "step"} for line in self._state.record]

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """The tensors that the last step remembered."""
        return self._memory.memory

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it Ctrl-C waits for the end of a step; afterwards the state is saved until the result is."""
        with delay_interrupts() as self._interrupted:
            yield
        self._save()

    def hold(self, name: str, module: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Keep a module, and the moments of optimizers, in the state; in a run that goes on they get their values."""
        self._state.model.add_module(name, module)
        trained = {f"{name}.{own}": x for own, x in module.named_parameters() if x.requires_grad}
        self._state.parameters = {**self._state.parameters, **trained}
        for optimizer in optimizers:
            self.share(optimizer)
        self._go_on()

    def hold_images(self, name: str, images: Tensor) -> None:
        """Keep images that are optimised in the state."""
        self._state.parameters = {**self._state.parameters, name: images}  # type: ignore[dict-item]
        self._go_on()

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer keep its moments with the others."""
        optimizer.state = self._moments.state

    def forget(self, *tensors: Tensor) -> None:
        """Drop the moments of these, as a new optimizer has none."""
        for x in tensors:
            self._moments.state.pop(x, None)

    def is_done(self) -> bool:
        """Whether an earlier run did the next step, which then is counted."""
        if self._at >= self._state.done:
            return False
        self._at += 1
        return True

    def add(self, line: Mapping[str, float], **memory: Tensor) -> None:
        """Count a step, with its line of the record, and what is to be remembered for the next ones."""
        self._at += 1
        self._state.done = self._at
        self._state.record.append({"step": self._at, **line})
        self._memory.memory = memory or self._memory.memory
        stops = self._interrupted()
        if self._pauses.due or stops:
            with self._pauses.taken():
                self._save()
        if stops:
            raise KeyboardInterrupt

    def _save(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._state.save(self._file, self._request)

    def _go_on(self) -> None:
        """Give all that is held the values of the state, unless this run is beyond it."""
        if self._file is not None and self._at in range(self._state.done or 1):
            self._state.restore(self._file, self._request)
