"""Whether a model says the facts of a facts file: what `edit_model`, `apply_patches` and `evaluate_models` judge by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.views.adapted import with_adapters

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.facts import FactsFile
    from mergekit_lfm.artifacts.patch import Patch
    from mergekit_lfm.edit.scores import FactScores
    from mergekit_lfm.runtime.load import Loaded
    from mergekit_lfm.store.checkpoint import Checkpoint


def load_for_texts(model: Path | Checkpoint, dtype: str, device: str) -> Loaded:
    """The language model in a folder, or in a view of its files. Raises PlanError if it lacks a tokenizer."""
    from mergekit_lfm.runtime.load import load_model, tokenizer_for_texts

    loaded = load_model(with_adapters(model), "lm", dtype=dtype, device=device)
    tokenizer_for_texts(loaded.tokenizer)
    return loaded


def score(loaded: Loaded, facts: FactsFile, doing: str, progress: Progress) -> FactScores:
    """The model's scores on the facts. doing: the name of this work for `progress`."""
    from mergekit_lfm.edit.scores import score_facts

    with progress.by_count(" prompts", doing) as count:
        return score_facts(loaded.model, loaded.tokenizer, facts, progress=count)


LEGEND = (
    "Shares of prompts: the right answer is the likelier of two after prompts (ES), paraphrases (PS) and prompts about "
    "other subjects (NS); it is the most likely of all after the same (EA, PA, NA); the model's own words say it (GA), "
    "also when it is asked (QA); other facts hold, of the same subjects (SA) and unedited ones."
)


def note_scores(folder: Path, scores: FactScores) -> None:
    """Put the scores of the edited facts into the card of a saved model, where it has one that lacks them."""
    from mergekit_lfm.edit.scores import METRICS
    from mergekit_lfm.output.card import CARD, NOT_JUDGED, with_scores
    from mergekit_lfm.output.lock import lock_of, revise
    from mergekit_lfm.store.files import read_text

    if CARD not in lock_of(folder).get("files", {}) or NOT_JUDGED not in (card := read_text(folder / CARD)):
        return
    shares = {metric if metric == "unedited" else metric.upper(): getattr(scores, metric) for metric in METRICS}
    revise(folder, CARD, with_scores(card, shares, LEGEND).encode())


def facts_of(patches: Sequence[Patch]) -> FactsFile | None:
    """The facts that the patches teach, the last word on each prompt; None if they teach none."""
    from mergekit_lfm.artifacts.facts import FactsFile, as_facts

    files = [as_facts(patch.info.facts) for patch in patches if patch.info.facts]
    facts = {fact.text: fact for file in files for fact in file.facts}
    others = {other.prompt: other for file in files for other in file.unedited if other.prompt not in facts}
    return FactsFile(tuple(facts.values()), tuple(others.values())) if facts else None


def check_runs(model: Path) -> None:
    """Raise an error, before anything is written, if the edited model could not be run to verify it.

    ImportError without transformers, PlanError without a config.
    """
    from mergekit_lfm.runtime.load import import_transformers

    import_transformers()
    if not (model / "config.json").is_file():
        raise PlanError(
            f"{model}: found no config.json there, so that the edited model cannot be run to verify it; expected the "
            "folder of a saved model. Give one, or use --no-verify (`verify=False`)"
        )


def is_enough(scores: FactScores | None, min_efficacy: float | None) -> bool:
    """False if the scores have a share of facts (EA) below `min_efficacy`."""
    return scores is None or min_efficacy is None or scores.ea is None or scores.ea >= min_efficacy


def check_efficacy(min_efficacy: float | None, *, verify: bool) -> None:
    """Raise PlanError for a smallest share that nothing is compared with, or outside 0 to 1."""
    if min_efficacy is None:
        return
    if not 0 <= min_efficacy <= 1:
        raise PlanError(f"min_efficacy is {min_efficacy}; expected a share, from 0 to 1")
    if not verify:
        raise PlanError("min_efficacy is compared with the edited model's answers; leave it out, or verify the model")
