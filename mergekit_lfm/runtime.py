"""Models that can run: the only way from a checkpoint folder to a forward pass.

The engine sees tensors and files; what needs a model loads it here, from local files alone. transformers comes with the
extra `models` and is imported when a model is loaded. A model that the files do not fill completely is refused:
transformers would start the rest at random and only log it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def positions(self) -> int | None:
        """The longest sequence the config allows, in tokens; None where it names no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)


def load_language_model(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """The causal language model and tokenizer in the folder at path. Nothing is fetched; no code of the folder is run.

    dtype is what it computes in: a torch dtype's name, or "auto" for the one it was saved in (half the memory for a
    bf16 model, but coarser results, and slow on most CPUs). Raises FormatError where path is no such folder or its
    files lack tensors of the model.
    """
    transformers = _transformers()
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder}: found no config.json there; expected the folder of a saved model, with its config, weights and "
            "tokenizer. Give the path of such a folder (a model on the Hub has to be downloaded first)"
        )
    with _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_complete(folder, report)
    return LanguageModel(model.to(device).eval(), tokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('running a model needs transformers: pip install "mergekit_lfm[models]"') from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bar for reading weights and no warning of what _check_complete reports as an error."""
    logging = transformers.utils.logging
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuse a model of which transformers had to invent a part."""
    missing = sorted(str(name) for name in report["missing_keys"])
    misfits = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    problems = [f"{name}: not in the files" for name in missing] + [f"{name}: of another shape" for name in misfits]
    if problems:
        raise FormatError(
            f"{folder}: the files do not hold the causal language model that its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nMake the config and the tensors agree; `mergekit-lfm inspect` lists the tensors"
        )
