"""The part of a meta-learning that a tuning lacks: episodes and the loss over them, and how the result is judged."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mergekit_lfm.api.tune_data import read_file
from mergekit_lfm.api.tune_plans import PlannedTuning
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.meta.algorithms import NO_NAMES, build_loss, make_episodes
from mergekit_lfm.meta.baselines import head_names, joint_start, plain_copy, random_start
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.evaluate import evaluate
from mergekit_lfm.meta.losses import Inner, MetaLoss, name_of
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS, Algorithm
from mergekit_lfm.recipe.meta_recipe import MetaRecipe, TestEntry
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import Loaded, load_model, tokenizer_for_texts
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.train.examples import Examples, join, seed_of
from mergekit_lfm.train.loop import STATE
from mergekit_lfm.train.losses import Loss, pool
from mergekit_lfm.train.state import METRICS
from mergekit_lfm.train.texts import lengthen_for

LEARNED = "meta-{}.bin"  # a file beside the model: a reader of checkpoints must not take it for weights
PLAIN = replace(ALGORITHMS["maml"], first_order=True)  # descent on all that is trained
JOINT = "joint"  # the folder of the joint training's state, beside the state of the meta-learning
_Work = tuple[MetaLoss, Mapping[str, Tensor], Episodes, list[Inner]]  # to judge: by which loss, where, on what


class MetaLessons:
    """Episodes, the loss over them, and the judgement of what was learned.

    examples: those of the training. texts: the model that makes vectors of the names of classes, if they have some.
    """

    def __init__(
        self,
        planned: PlannedTuning,
        recipe: MetaRecipe,
        examples: Examples,
        progress: Progress,
        texts: Checkpoint | None = None,
    ) -> None:
        self.planned, self.examples, self.progress = planned, examples, progress
        self.recipe, self.documents = recipe, dict[str, bytes]()
        self.loss: MetaLoss | None = None
        names = {} if recipe.texts is None else recipe.texts.names
        self.names = NO_NAMES if texts is None else vectors_of(names, texts, planned.device)
        self.before = dict[str, Tensor]()
        self.tests: tuple[Episodes, Episodes] | None = None

    def begin(self, loaded: Loaded, examples: Examples) -> tuple[Episodes, Loss]:
        """The episodes, and the loss over them; what is learned beside the model becomes a part of it."""
        recipe, model, row = self.recipe, loaded.model, self.recipe.row
        self.before = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
        head = head_names(model) if row.head_only else frozenset[str]()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(recipe.seed, "beside"))
            settings = dict(recipe.own_settings)
            if self.names:
                settings["text_width"] = len(next(iter(self.names.values())))
            self.loss = build_loss(model, recipe.task, row, Inner(*recipe.inner), head, settings)
        episodes = self._episodes(examples, recipe.seed, row)
        if row.hard_tasks:
            episodes = replace(episodes, hardness=self.loss.watch(episodes.classes))
        if recipe.test is not None:
            self.tests = self._tests(loaded)  # which checks them
        return episodes, self.loss

    def _tests(self, loaded: Loaded) -> tuple[Episodes, Episodes]:
        """The episodes of the test: those of the algorithm, and of plain descent. No stream is tested by a stream."""
        recipe, row = self.recipe, self.recipe.row
        sets = [read_file(file, loaded, self.planned, fits=recipe.labels_fit) for file in recipe.more_files]
        sets = lengthen_for(loaded, [self.examples, *sets])[1:]
        whole, seed = join(sets, [None] * len(sets)), seed_of(recipe.seed, "test")
        own = self._episodes(whole, seed, PLAIN if row.kind == "stream" else row)
        return own, self._episodes(whole, seed, PLAIN) if row.named else own  # which have no names

    def _episodes(self, examples: Examples, seed: int, row: Algorithm) -> Episodes:
        """Episodes of these examples, as an algorithm has them."""
        recipe = self.recipe
        sizes = {"ways": recipe.ways, "shots": recipe.shots, "queries": recipe.queries}
        return make_episodes(row, recipe.own_settings, examples, self.names, **sizes, seed=seed)

    def end(self, loaded: Loaded) -> dict[str, Any]:
        """The scores of the result and of what it is compared with on tasks that were not seen; nothing without them.

        Puts all that was learned beside the model into its parameters, or into a file.
        """
        loss = self.loss
        assert loss is not None
        with torch.no_grad():
            found = {name: x.detach().clone() for name, x in loss.start().items()}
        facts = loss.facts()
        facts |= {} if self.recipe.test is None else {"test": self._judge(loaded, loss, found)}
        loss.fold()
        if loss.beside is not None and self.recipe.row.own_file:
            tensors = {name_of(name): x.detach().contiguous() for name, x in loss.beside.named_parameters()}
            self.documents[LEARNED.format(self.recipe.algorithm)] = save(tensors)
        return facts

    def clear(self) -> None:
        """Remove the state of the joint training."""
        folder = self.planned.training / JOINT
        for name in (STATE, METRICS):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def _judge(self, loaded: Loaded, loss: MetaLoss, found: Mapping[str, Tensor]) -> dict[str, Any]:
        """The scores of the starts, each in the cell of the grid that is best for it."""
        recipe, test, model = self.recipe, self.recipe.test, loaded.model
        assert test is not None
        assert self.tests is not None
        (episodes, theirs), row = self.tests, recipe.row
        starts = {"start": self.before, "joint": self._joint(model, test)}
        if recipe.declaration.makes == "checkpoint":  # else a part of a model is trained, which is not drawn at random
            starts = {"random": random_start(model, self.before, seed_of(recipe.seed, "random")), **starts}
        judged = row if row.kind == "edits" else PLAIN
        plain = build_loss(plain_copy(model, self.before), recipe.task, judged, Inner(1, 0.1))
        grid = [Inner(count, rate) for rate in test.rates for count in test.steps]
        own = grid
        if not row.adapts:
            own = [Inner(0, 0.0)]
        elif row.learns_steps:
            own = [loss.inner]
        elif row.learns_rates:
            own = [Inner(count, None) for count in test.steps]
        work: dict[str, _Work] = {name: (plain, start, theirs, grid) for name, start in starts.items()}
        work[recipe.algorithm] = (loss, found, episodes, own)
        at_once, scores = -(-recipe.options.batch_size // recipe.options.accumulate), dict[str, Any]()
        with self.progress.by_count(" starts", "judging") as tell:
            for name, (judge, start, tasks, cells) in work.items():
                scores[name] = asdict(evaluate(judge, start, tasks, cells, test.episodes, at_once))
                tell(len(scores), len(work))
        return scores

    def _joint(self, model: nn.Module, test: TestEntry) -> dict[str, Tensor]:
        """The parameters after ordinary training on as many examples as the episodes had."""
        recipe, options = self.recipe, self.recipe.options
        rate = recipe.declaration.rate if options.optimizer == "sgd" else options.learning_rate
        ordinary = Options(
            steps=options.steps,
            batch_size=options.batch_size * (recipe.ways or 1) * (recipe.shots + recipe.queries),
            accumulate=options.accumulate,
            learning_rate=test.joint_rate or rate,
            seed=recipe.seed,
        )
        with self.progress.by_step(" steps", "joint training") as report:
            return joint_start(
                model,
                self.before,
                self.examples,
                recipe.task,
                ordinary,
                by_classes=recipe.ways is not None,
                place=self.planned.training / JOINT,
                request=f"{self.planned.answer.digest} joint",
                tell=lambda done, whole, line: report(done, whole, f"loss {line['loss']:.4g}"),
            )


@torch.no_grad()
def vectors_of(names: Mapping[int, str], texts: Checkpoint, device: str) -> dict[int, Tensor]:
    """The vectors of names by a model of embeddings, [d] each, of length 1."""
    loaded = load_model(texts, "embedding", device=device)
    place = next(loaded.model.parameters()).device
    tokenizer, found = tokenizer_for_texts(loaded.tokenizer), dict[int, Tensor]()
    for label, name in names.items():
        ids = torch.tensor([tokenizer(name)["input_ids"][: loaded.positions]], device=place)
        found[label] = pool(loaded.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].float().cpu()
    return found
