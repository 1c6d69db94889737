"""Models that can run: the only way from a checkpoint folder to a forward pass.

The engine sees tensors and files; what needs a model loads it here, from local files alone. transformers comes with the
extra `models` and is imported when a model is loaded. A model that the files do not fill completely is refused:
transformers would start the rest at random and only log it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.errors import FormatError, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

# What a model is loaded to do, and what messages call it then.
TASKS = {"lm": "causal language model", "classification": "classifier", "embedding": "encoder"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode that was loaded for a task, its tokenizer, and the checkpoint it comes from.

    tokenizer is None where the folder holds none, as for a model of images.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    task: str
    checkpoint: Checkpoint

    @property
    def positions(self) -> int | None:
        """The longest sequence the config allows, in tokens; None where it names no limit."""
        config: Any = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)


def load_model(path: str | Path, task: str, *, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """The model and tokenizer in the folder at path. Nothing is fetched; no code of the folder is run.

    task says what of the model is wanted: "lm" a causal language model, "classification" a classifier of texts or
    images, "embedding" the encoder without a head. dtype is what it computes in: a torch dtype's name, or "auto" for
    the one it was saved in (half the memory for a bf16 model, but coarser results, and slow on most CPUs). Raises
    FormatError where path is no such folder or its files lack tensors of the model, PlanError for an unknown task.
    """
    if task not in TASKS:
        raise PlanError(f"there is no task {task!r}; expected {', '.join(TASKS)}. Choose one of them")
    transformers = _transformers()
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder}: found no config.json there; expected the folder of a saved model, with its config, weights and "
            "tokenizer. Give the path of such a folder (a model on the Hub has to be downloaded first)"
        )
    checkpoint = open_checkpoint(folder)
    with _quiet(transformers):
        tokenizer = _tokenizer(transformers, folder)
        model = _complete_model(_auto_class(transformers, checkpoint, task), folder, task, dtype)
    if task == "classification" and tokenizer is not None and model.config.get_text_config().pad_token_id is None:
        # Decoders refuse batches without a padding token, to find each row's last token by. No row is padded here: an
        # id that no token has makes the last one count.
        model.config.get_text_config().pad_token_id = -1
    return Loaded(model.to(device).eval(), tokenizer, task, checkpoint)


def tokenizer_for_texts(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, which texts need; PlanError where there is none."""
    if tokenizer is None:
        raise PlanError(
            "the data are texts, and the model has no tokenizer; expected tokenizer.json or its like in the model's "
            "folder. Save the tokenizer there, or give arrays (.npz, or batches in Python)"
        )
    return tokenizer


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What the first token of a text is predicted from: the tokenizer's BOS, else its EOS. FormatError without both."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise FormatError(
            "the tokenizer has neither a BOS nor an EOS token; one is expected, to predict the first token from. "
            "Set bos_token in tokenizer_config.json"
        )
    return int(start)


def logits(output: Any) -> Tensor:
    """The scores of the classes or of the vocabulary in what a model returned: its `logits`, itself, or its first."""
    found = getattr(output, "logits", output)
    return _tensor_in(found, "logits [examples, classes]")


def embeddings(output: Any) -> Tensor:
    """One vector for each example, [n, d]: the mean over the tokens of the last hidden state, of length 1.

    What is [n, d] already, as some models return, stays as it is. Source: Reimers and Gurevych 2019 (Sentence-BERT,
    arXiv 1908.10084), section 3, mean pooling; over all tokens, because nothing is padded here.
    """
    import torch

    states = _tensor_in(getattr(output, "last_hidden_state", output), "hidden states [examples, tokens, width]")
    if states.ndim == 2:
        return states
    if states.ndim != 3:
        raise PlanError(
            f"the model returned states of shape {list(states.shape)}; expected [examples, tokens, width] or "
            "[examples, width]. Wrap it in a module that returns one vector for each example"
        )
    return torch.nn.functional.normalize(states.mean(1), dim=-1)


def _tensor_in(found: Any, expected: str) -> Tensor:
    import torch

    if not isinstance(found, torch.Tensor) and isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, torch.Tensor):
        return found
    raise PlanError(f"the model returned a {type(found).__name__}; expected {expected}. Wrap it in a module that does")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = 'running a model needs transformers: pip install "mergekit_lfm[models]"'
        raise ImportError(message, name="transformers") from error
    return transformers


def _tokenizer(transformers: Any, folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _auto_class(transformers: Any, checkpoint: Checkpoint, task: str) -> Any:
    """The class of transformers that loads the model for the task."""
    if task == "lm":
        return transformers.AutoModelForCausalLM
    if task == "embedding":
        return transformers.AutoModel
    saved_as = checkpoint.config.get("architectures") or []
    if any("ForImageClassification" in name for name in saved_as):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def _complete_model(auto: Any, folder: Path, task: str, dtype: str) -> Any:
    """The model with every tensor from the files. Without its pooler, where these have none: embeddings use none."""

    def load(**options: bool) -> tuple[Any, list[str]]:
        model, report = auto.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        missing = sorted(f"{name}: not in the files" for name in report["missing_keys"])
        return model, missing + sorted(f"{entry[0]}: of another shape" for entry in report["mismatched_keys"])

    model, problems = load()
    poolable = "add_pooling_layer" in signature(type(model).__init__).parameters
    if task == "embedding" and problems and poolable and all(line.startswith("pooler.") for line in problems):
        model, problems = load(add_pooling_layer=False)
    if problems:
        raise FormatError(
            f"{folder}: the files do not hold the {TASKS[task]} that its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nMake the config and the tensors agree; `mergekit-lfm inspect` lists the tensors"
        )
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bar for reading weights and no warning of what _complete_model reports as an error."""
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
