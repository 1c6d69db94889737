"""Reptile over checkpoints, for models of any size: each task tunes the last start, and the engine merges the results.

A round is an outer step: OUT.rounds/ROUND has a checkpoint for each of its tasks, and `start`, which is start + rate *
mean(task - start), a merge by task arithmetic. A complete checkpoint is not made again, so that a run that was killed
goes on, and processes that do the same share the tasks of a round: each has a folder that is locked while one works on
it. The recipe says all that a task depends on, so that the bytes are the same for any number of processes.
Source: Nichol et al. 2018, arXiv 1803.02999, algorithm 2 (batched).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from mergekit_lfm.api.merge import merge
from mergekit_lfm.api.meta_plans import PlannedMeta
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.tune import known_result, tune_planned
from mergekit_lfm.api.tune_data import read_all
from mergekit_lfm.api.tune_plans import PlannedTuning, plan_tuning
from mergekit_lfm.api.tune_results import Tuned, save_tuned
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.tune_recipe import TuneRecipe
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.locks import BusyError, lock_folder
from mergekit_lfm.store.places import beside, remove
from mergekit_lfm.train.examples import seed_of

ROUNDS, START, TASK, LOCK = ".rounds", "start", "task-{}", ".lock"
DIGEST = re.compile("[0-9a-f]{32}")  # of a request, which names the folder of its rounds
PAUSE = 0.2  # seconds between two looks at what other processes do


def learn_on_disk(
    planned: PlannedMeta, *, threads: int | None = None, overwrite: bool = False, progress: Progress = SILENCE
) -> Outcome[Tuned]:
    """Carry a planned meta-learning out, with the models of the tasks on the disk; as `meta_train` does.

    Raises PlanError if the folder of the rounds holds something else.
    """
    began, request = time.monotonic(), planned.answer
    there, findings = planned.request.is_answered(planned.out, overwrite=overwrite), list[str]()
    if not there:
        if overwrite and request.is_of(planned.out):
            remove(planned.out)
        read_all(load_model(planned.source, planned.recipe.task, device=planned.device), planned)  # refuses wrong data
        rounds = _Rounds(planned, threads, _folder_of(planned))
        with progress.by_count(" rounds", "meta-learning") as tell:
            for number in range(rounds.last + 1):
                rounds.make(number)
                tell(number + 1, rounds.last + 1)
        findings = rounds.publish()
    warnings = warn_of([*planned.notices, *findings])
    return Outcome(planned.out, known_result(planned), request.digest, there, warnings, time.monotonic() - began)


def _folder_of(planned: PlannedMeta) -> Path:
    """The folder of the rounds of a request, made if it is not there; those of other requests are removed."""
    folder, own = beside(planned.out, ROUNDS), planned.answer.digest
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PlanError(f"{folder} is in the way of the models of the tasks; move it away")
    others = [path.name for path in folder.iterdir() if path.name != own] if folder.is_dir() else []
    if strange := [name for name in others if not DIGEST.fullmatch(name)]:
        raise PlanError(f"{folder} holds {strange[0]}, which is of no meta-learning; move it away")
    for name in others:
        remove(folder / name)
    (folder / own).mkdir(parents=True, exist_ok=True)
    return folder / own


class _Rounds:
    """The rounds of a meta-learning, in a folder."""

    def __init__(self, planned: PlannedMeta, threads: int | None, folder: Path) -> None:
        self.planned, self.recipe, self.threads, self.folder = planned, planned.meta, threads, folder
        self.last = planned.recipe.options.steps - 1

    def start_after(self, number: int) -> Path:
        """The folder of the start that a round leaves."""
        return self.folder / f"{number:06}" / START

    def make(self, number: int) -> None:
        """Make a round together with other processes, whose part is waited for; complete checkpoints stay."""
        place, tasks = self.start_after(number).parent, self.tasks(number)
        while not self._is_made(number):
            done = [self._once(place / TASK.format(task), partial(self._tune, number, task)) for task in tasks]
            if not all(done) or not self._once(place / START, partial(self._merge, number, tasks)):
                time.sleep(PAUSE)
        if number < self.last:  # of the last one the losses are read
            _remove_all(place.glob(TASK.format("*")))
        _remove_all([self.start_after(number - 2).parent])  # a slow process may still read the start before this one

    def _is_made(self, number: int) -> bool:
        """Whether a round is complete, or a later one, or another process has written the result."""
        later = (path for path in self.folder.glob("*") if path.name.isdigit() and int(path.name) >= number)
        return any((path / START).is_dir() for path in later) or self.planned.request.is_of(self.planned.out)

    def publish(self) -> list[str]:
        """Write the last start as the result, unless another process does, and remove the folder; findings."""
        out, findings = self.planned.out, list[str]()
        while not self.planned.request.is_of(out):
            try:
                with lock_folder(self.folder):
                    if not self.planned.request.is_of(out):
                        self.planned.check_unchanged()
                        findings = save_tuned(
                            self.planned, open_checkpoint(self.start_after(self.last)), {}, self._result()
                        )
            except (BusyError, FileNotFoundError):
                time.sleep(PAUSE)
        _remove_all([self.folder])
        with suppress(OSError):
            self.folder.parent.rmdir()
        return findings

    def tasks(self, number: int) -> list[int]:
        """The data files of a round: all in an order of its own each time round."""
        files, size = len(self.recipe.files), self.recipe.options.batch_size
        found = list[int]()
        for place in range(number * size, (number + 1) * size):
            turn, own = divmod(place, files)
            generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, "round", turn))
            found.append(int(torch.randperm(files, generator=generator)[own]))
        return [*dict.fromkeys(found)]

    def planned_task(self, number: int, task: int) -> PlannedTuning:
        """The tuning of a task from the start of a round."""
        recipe, (steps, rate) = self.recipe, self.recipe.inner
        entry = recipe.data[task].facts
        document = {
            "job": "tune",
            "model": recipe.model if number == 0 else str(self.start_after(number - 1)),
            "data": [{**entry, "path": str(self.planned.path_of(recipe.files[task]))}],
            "task": recipe.task,
            "steps": steps,
            "batch_size": recipe.shots,
            "learning_rate": rate,
            "optimizer": "sgd",
            "schedule": "constant",
            "clip": 0.0,
            "seed": seed_of(recipe.seed, "task", number, task) % 2**63,
            **({"window": recipe.window} if recipe.window is not None else {}),
        }
        out = self.folder / f"{number:06}" / TASK.format(task)
        return plan_tuning(TuneRecipe.parse(document, label=f"round {number + 1}"), out, device=self.planned.device)

    def _tune(self, number: int, task: int) -> None:
        tune_planned(self.planned_task(number, task), threads=self.threads)

    def _merge(self, number: int, tasks: list[int]) -> None:
        """The engine's task arithmetic over the models of a round's tasks."""
        base = self.recipe.model if number == 0 else str(self.start_after(number - 1))
        weight = self.recipe.options.rate(number) / len(tasks)
        places = [str(self.folder / f"{number:06}" / TASK.format(task)) for task in tasks]
        models = [{"model": place, "parameters": {"weight": weight}} for place in places]
        document = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
        merge(document, self.start_after(number), threads=self.threads, card=False)

    def _result(self) -> Tuned:
        """The facts of the last round: the mean loss of its tasks."""
        losses = [known_result(self.planned_task(self.last, task)).loss for task in self.tasks(self.last)]
        size = sum(spec.numel for spec in self.planned.source.values())
        return Tuned("checkpoint", self.last + 1, size, size, sum(losses) / len(losses))

    @staticmethod
    def _once(place: Path, make: Callable[[], None]) -> bool:
        """Make a checkpoint, if it is missing; False while another process does."""
        lock = place.with_name(f"{place.name}{LOCK}")
        try:
            lock.mkdir(parents=True, exist_ok=True)
            with lock_folder(lock):
                if not place.is_dir():
                    make()
        except BusyError:
            return False
        return True


def _remove_all(places: Iterable[Path]) -> None:
    """Remove folders; another process may do so at the same time."""
    for place in places:
        with suppress(FileNotFoundError):
            remove(place)
