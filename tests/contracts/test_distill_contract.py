"""The contract of all terms of a distillation, for each task that they fit, with small models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lfm.distill.course import Course, even_pairs
from mergekit_lfm.distill.follow import Follow
from mergekit_lfm.distill.teachers import Live, Reading, rows_of
from mergekit_lfm.distill.watch import PLACES
from mergekit_lfm.recipe.distill_terms import DEFAULTS, DISTILL_TERMS
from mergekit_lfm.runtime.functional import use_plain_attention
from mergekit_lfm.runtime.tasks import TUNE_TASKS
from mergekit_lfm.train.examples import IGNORED

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
TERMS = {name: term for name, term in DISTILL_TERMS.items() if term.reads != "labels"}
PAIRS = [(name, task) for name, term in TERMS.items() for task in term.tasks]
NOT_ZERO = ("hard", "vid", "local")  # of a student that is its teacher


def model_of(task: str, seed: int) -> Any:
    """A model of random weights for a task, in float64."""
    torch.manual_seed(seed)
    if task == "lm":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3)
        model = transformers.LlamaForCausalLM(config)
    elif task == "seq2seq":
        sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, dropout_rate=0.0))
    else:
        kinds = {"classification": "BertForSequenceClassification", "regression": "BertForSequenceClassification"}
        kind = {**kinds, "masked_lm": "BertForMaskedLM", "embedding": "BertModel"}[task]
        labels = {"num_labels": 1 if task == "regression" else 3}
        model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, **STILL, **labels))
    use_plain_attention(model)
    return model.double().train()


def batch_of(task: str) -> dict[str, Tensor]:
    """Four examples, of two lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 20, (4, 6), generator=generator), torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    tokens = torch.where(mask > 0, ids, IGNORED)
    if task == "embedding":
        return batch
    if task == "seq2seq":
        return {**batch, "decoder_input_ids": ids * mask, "decoder_attention_mask": mask, "labels": tokens}
    labels = {"classification": torch.tensor([0, 2, 1, 2]), "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()}
    return {**batch, "labels": labels.get(task, tokens)}


def follow_of(name: str, task: str, teacher: Any) -> tuple[Follow, dict[str, Tensor]]:
    """The loss of a term by a teacher, and a batch."""
    batch = batch_of(task)
    if name == "uld":
        batch[PLACES] = torch.where(batch["attention_mask"] > 0, torch.arange(6), -1)
    layered = DISTILL_TERMS[name].layered
    course = Course(task, {name: 1.0}, [even_pairs(2, 2) if layered else ()], [1.0])
    return Follow(course, [Live(teacher.eval(), Reading(task, course.wanted(0)))]), batch


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_term_draws_a_student_to_its_teacher(name: str, task: str) -> None:
    """Its gradient is finite and not zero, a step along it lowers it, and a student that is its teacher has none."""
    student = model_of(task, 1)
    follow, batch = follow_of(name, task, model_of(task, 0))
    follow.build(student, batch, 0)
    loss = follow(student, batch)
    loss.total.backward()  # type: ignore[no-untyped-call]
    moved = [x for x in student.parameters() if x.grad is not None and x.grad.any()]
    assert moved and all(bool(x.grad.isfinite().all()) for x in moved if x.grad is not None)
    length = sum(float(x.grad.square().sum()) for x in moved if x.grad is not None)
    with torch.no_grad():
        for x in moved:
            x -= 1e-4 * x.grad / length**0.5
    assert float(follow(student, batch).total.detach()) < float(loss.total.detach())
    if name not in NOT_ZERO:
        twin = model_of(task, 0)
        follow, batch = follow_of(name, task, model_of(task, 0))
        follow.build(twin, batch, 0)
        assert float(follow(twin, batch).total.detach()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("name", "task"), [pair for pair in PAIRS if not TERMS[pair[0]].together])
def test_a_batch_has_the_loss_of_its_examples(name: str, task: str) -> None:
    student = model_of(task, 1)
    follow, batch = follow_of(name, task, model_of(task, 0))
    follow.build(student, batch, 0)
    whole, apart = follow(student, batch), [follow(student, row) for row in rows_of(batch)]
    assert whole.number == sum(each.number for each in apart)
    assert float(whole.total.detach()) == pytest.approx(sum(float(x.total.detach()) for x in apart), rel=1e-9)


def test_every_task_has_a_default() -> None:
    assert DEFAULTS.keys() == TUNE_TASKS.keys()
    assert all(task in DISTILL_TERMS[name].tasks for task, terms in DEFAULTS.items() for name in terms)
