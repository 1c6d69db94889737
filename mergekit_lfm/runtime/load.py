"""Models that can run: the only way from a checkpoint folder to a forward pass.

The engine sees tensors and files; code that needs a model loads it here, from local files alone. transformers comes
with the extra `models` and is imported when a model is loaded. A model that the files do not fill completely is
refused: transformers would initialise the rest at random and only log it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.runtime.tasks import HEADED, TUNE_TASKS
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import name_file
from mergekit_lfm.store.sidecars import sidecars_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
# Options of from_pretrained: no network, and no code of the folder, which it would ask about on standard input.
OURS = {"local_files_only": True, "trust_remote_code": False}
PROBE = 4  # tokens, to see whether a model looks ahead
# Rounding alone moves a logit by up to this fraction of the largest: an expert's batch depends on the other tokens. In
# a BERT of random weights, later tokens move it by 0.005, in a trained one by far more.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, loaded for a task, with its tokenizer and the checkpoint it comes from.

    tokenizer: None if the folder lacks one, as for a model of images. virtual: the tokens of a prompt before each text.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    task: str
    checkpoint: Checkpoint
    virtual: int = 0

    @property
    def positions(self) -> int | None:
        """The longest text the config allows, in tokens; None if it names no limit (XLNet says -1).

        RoBERTa counts from 2: the first rows of its table of positions stand for padding.
        """
        config: Any = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit is None or limit < 1:
            return None
        tables = (module for name, module in self.model.named_modules() if name.endswith("position_embeddings"))
        padding = next((getattr(table, "padding_idx", None) for table in tables), None)
        return int(limit) - (0 if padding is None else padding + 1) - self.virtual


def load_model(path: str | Path | Checkpoint, task: str, *, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """Load the model and tokenizer in the folder at path. Fetches nothing and runs no code of the folder.

    If path is a view, such as a checkpoint rewritten by a transform, the tensors are read through it, and the config
    and the tokenizer come from its folder. task: "lm" for a causal language model, of texts or of images and texts,
    "classification" for a classifier of texts or images, "embedding" for the encoder without a head, "masked_lm",
    "seq2seq", or "regression" for a head of one output. dtype: the torch dtype to compute in, by name, or
    "auto" for the one it was saved in (half the memory for a bf16 model, but coarser results, and slow on most CPUs).
    Raises FormatError if path is not such a folder or its files lack tensors of the model, PlanError for an unknown
    task, for an architecture that cannot do it, and for an unavailable device or dtype.
    """
    if task not in TUNE_TASKS:
        raise PlanError(f"found the task {task!r}; expected {', '.join(TUNE_TASKS)}. Choose one of them")
    import torch

    device = _check_place(device, dtype)
    transformers = import_transformers()
    if isinstance(path, Checkpoint):
        sidecars_of(path)  # fetches the other files of a model on the Hub
    folder = path.path if isinstance(path, Checkpoint) else Path(path)
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder}: found no config.json there; expected the folder of a saved model, with its config, weights and "
            "tokenizer. Give the path of such a folder, or open_checkpoint(NAME) for a model on the Hub"
        )
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(folder)
    with without_noise(transformers), loading(folder, task):
        config = transformers.AutoConfig.from_pretrained(folder, **OURS)
        if "quantization_config" not in checkpoint.config and hasattr(config, "quantization_config"):
            del config.quantization_config  # a view that is read as float32
        _check_architecture(config, folder, task)
        tokenizer = _tokenizer(transformers, folder)
        auto = _auto_class(transformers, config, task)
        if isinstance(path, Checkpoint):
            with torch.device("meta"):
                kind = type(auto.from_config(config, trust_remote_code=False))
            tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}
            model = _complete_model(_reader_of(tensors, kind, config), folder, task, dtype)
        else:
            model = _complete_model(partial(auto.from_pretrained, folder), folder, task, dtype)
    text_config = model.config.get_text_config()
    if task in HEADED and tokenizer is not None and getattr(text_config, "pad_token_id", 0) is None:
        # Decoders need a padding token to find each row's last token. No row is padded here: an id that no token has
        # makes the last one count.
        text_config.pad_token_id = -1
    loaded = Loaded(model.to(device).eval(), tokenizer, task, checkpoint)
    if task == "lm":
        _check_causal(loaded)
    return loaded


def empty_model(source: Checkpoint, task: str) -> nn.Module:
    """A model as `load_model` loads it, without values: its parameters are on the meta device. Raises as that does."""
    import torch

    transformers, folder = import_transformers(), source.path
    with without_noise(transformers), loading(folder, task), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, **OURS)
        _check_architecture(config, folder, task)
        model: nn.Module = _auto_class(transformers, config, task).from_config(config, trust_remote_code=False)
    return model


def load_reader(source: Checkpoint, task: str) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of a model, None without one, and the longest sequence it takes, None without a limit."""
    transformers, folder = import_transformers(), source.path
    sidecars_of(source)  # fetches the other files of a model on the Hub
    with without_noise(transformers), loading(folder, task):
        loaded = Loaded(empty_model(source, task), _tokenizer(transformers, folder), task, source)
        return loaded.tokenizer, loaded.positions


def classifier_with_new_head(
    source: Checkpoint, labels: Sequence[str], seed: int, *, empty: bool = False
) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """A classifier for these labels that has a saved model as its trunk, in the model's dtype, and a new head.

    Also the names of the new parameters, and those of tensors that it has no place for. empty: without values. Raises
    PlanError for an architecture without classifiers, FormatError if more than a head would be new.
    """
    import torch

    transformers, folder = import_transformers(), source.path
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    auto = transformers.AutoModelForSequenceClassification
    with without_noise(transformers), loading(folder, "classification"), torch.random.fork_rng([]):
        config = transformers.AutoConfig.from_pretrained(folder, num_labels=len(labels), **named, **OURS)
        if getattr(config, "is_encoder_decoder", False):
            raise PlanError(f"{folder} is an encoder with a decoder, expected a model without; give another")
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
        dtype = _most_frequent_dtype(source)
        if empty:
            return model.to(dtype), (), ()
        torch.manual_seed(seed)
        tensors = {name: source.read(name).view(spec.shape) for name, spec in source.items()}
        read = _reader_of(tensors, type(model), config)
        model, report = read(dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **OURS)
    added = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    trunk = f"{model.base_model_prefix}."
    if wrong := [name for name in added if name.startswith(trunk) and ".pooler." not in name]:
        raise FormatError(f"{folder} lacks {', '.join(wrong[:5])} of the {_architecture(config)}; give the whole model")
    return model.eval(), tuple(added), tuple(sorted(report["unexpected_keys"]))


def save_quietly(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save a model of transformers with these tensors, without its bar."""
    with without_noise(import_transformers()):
        model.save_pretrained(folder, state_dict=dict(tensors))


def _most_frequent_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype that most numbers of a checkpoint have."""
    import torch

    sizes: dict[str, int] = {}
    for spec in source.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    kind: torch.dtype = getattr(torch, max(sizes, key=lambda dtype: sizes[dtype]))
    return kind


def load_as_saved(folder: Path, tensors: Mapping[str, Tensor]) -> Loaded:
    """Load the model as the class that the folder's config names, head included, with `tensors` instead of the files'.

    tensors: by their names on the disk, all of one dtype if floating. Its task is "embedding", a placeholder for any.
    Raises the errors of `load_model`.
    """
    transformers = import_transformers()
    checkpoint = open_checkpoint(folder)
    dtype = next(str(x.dtype).removeprefix("torch.") for x in tensors.values() if x.is_floating_point())
    with without_noise(transformers), loading(folder, "embedding"):
        config = transformers.AutoConfig.from_pretrained(folder, **OURS)
        name = next(iter(config.architectures or []), None)
        kind = getattr(transformers, name or "", None)
        if kind is None:
            raise FormatError(
                f"{folder}: config.json names the class {name!r}, which transformers does not have; expected one of "
                "its models under `architectures`. Save the model with transformers"
            )
        model = _complete_model(_reader_of(tensors, kind, config), folder, "embedding", dtype)
    return Loaded(model.eval(), None, "embedding", checkpoint)


def run(model: nn.Module, args: Sequence[Tensor] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """The model's output for these inputs. Raises a PlanError that names the expected inputs if the model fails."""
    kwargs = kwargs or {}
    try:
        return model(*args, **kwargs)
    except (FormatError, PlanError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        named = {**{f"input {i}": x for i, x in enumerate(args)}, **kwargs}
        inputs = ", ".join(f"{name} {_describe(x)}" for name, x in named.items()) or "no inputs"
        raise PlanError(
            f"{type(model).__name__} failed on {inputs} ({reason(error)}); expected the inputs of its forward: "
            f"{', '.join(signature(model.forward).parameters)}. Give data that fit the model, or a model that fits them"
        ) from error


def tokenizer_for_texts(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, which texts need. Raises PlanError for None."""
    if tokenizer is None:
        raise PlanError(
            "the data are texts, and the model has no tokenizer; expected a file like tokenizer.json in the model's "
            "folder. Save the tokenizer there, or give arrays (.npz, or batches in Python)"
        )
    return tokenizer


def start_token(tokenizer: Tokenizer) -> int:
    """The token before a text's first: the tokenizer's BOS, else its EOS. Raises FormatError if it has neither."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise FormatError(
            "the tokenizer has neither a BOS nor an EOS token; expected one, to predict the first token from. "
            "Set bos_token in tokenizer_config.json"
        )
    return int(start)


def logits(output: Any) -> Tensor:
    """The scores of classes or vocabulary in a model's output: its `logits`, itself, or its first item."""
    return _tensor_in(getattr(output, "logits", output), "logits [examples, classes]")


def embeddings(output: Any) -> Tensor:
    """One vector for each example, [n, d]: the mean over the tokens of the last hidden state, of length 1.

    Some models return [n, d] already; it stays as it is. Source: Reimers and Gurevych 2019 (Sentence-BERT,
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


def _tensor_in(output: Any, expected: str) -> Tensor:
    import torch

    if not isinstance(output, torch.Tensor) and isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, torch.Tensor):
        return output
    raise PlanError(f"the model returned a {type(output).__name__}; expected {expected}. Wrap it in a module that does")


def import_transformers() -> Any:
    """The transformers library. Raises an ImportError that says how to install it."""
    return import_extra("transformers", "running a model", "models")


def _describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if hasattr(x, "dtype") else repr(x)


def _check_place(device: str, dtype: str) -> str:
    """The device's name in full. Raises PlanError for an unavailable device or an unknown dtype."""
    import torch

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise PlanError(
            f"found the dtype {dtype!r}; expected float32, float64, bfloat16, float16 or auto. Choose one of these"
        )
    return str(find_device(device))


def _check_architecture(config: Any, folder: Path, task: str) -> None:
    """Raises PlanError for an encoder with a decoder, except for seq2seq, and to classify by the decoder's output.

    And for a class of the folder's own code: transformers would take another one that lacks a part of it.
    """
    named = next(iter(config.architectures or []), None)
    if named is not None and getattr(config, "auto_map", None) and not hasattr(import_transformers(), named):
        raise PlanError(
            f"{folder}: {named} is a class of its own code, which is not run; expected one of transformers. Give the "
            "model that it was made from, with its adapter if it was exported with one"
        )
    both, unfit = getattr(config, "is_encoder_decoder", False), f"does not fit the task {task!r}"
    if task == "seq2seq" and not both:
        raise PlanError(
            f"{folder}: its architecture, {_architecture(config)}, {unfit}: it has no encoder with a decoder. Give "
            "such a model, as T5 or BART, or choose the task lm"
        )
    if both and task not in ("classification", "seq2seq"):
        raise PlanError(
            f"{folder}: its architecture, {_architecture(config)}, {unfit}: its decoder needs "
            "inputs of its own. Give a model that takes the text alone"
        )
    if task == "regression" and config.num_labels != 1:
        raise PlanError(
            f"{folder}: its head has {config.num_labels} outputs, expected one for regression; make a model with one "
            "by `mergekit-lfm head MODEL --labels 1`"
        )


def _architecture(config: Any) -> str:
    return ", ".join(config.architectures or [type(config).__name__])


def looks_ahead(model: nn.Module, positions: int | None, read: Callable[[Any], Tensor]) -> bool:
    """Whether a model's output at the first token depends on later ones. read: the output [n, tokens, d] in its own."""
    import torch

    length = min(PROBE, positions or PROBE)
    ids = torch.zeros(2, length, dtype=torch.long, device=next(model.parameters()).device)
    ids[1, 1:] = 1
    with torch.inference_mode():
        found = read(run(model, kwargs={"input_ids": ids}))[:, 0]  # [2, d]
    first, second = found.float()
    rounding = max(ROUNDING, 4 * torch.finfo(found.dtype).eps)
    return float((first - second).abs().max()) > rounding * float(first.abs().max())


def _check_causal(loaded: Loaded) -> None:
    """Raises PlanError if the first token's scores depend on later tokens, as in a BERT that is not a decoder."""
    if looks_ahead(loaded.model, loaded.positions, logits):
        raise PlanError(
            f"{loaded.checkpoint.path}: its architecture, {_architecture(loaded.model.config)}, is not a "
            f"{TUNE_TASKS['lm']}: its scores of a token depend on later tokens. Give a model that predicts the next "
            "token (for a BERT trained that way, set is_decoder: true in the config)"
        )


@contextmanager
def reading(folder: Path, task: str) -> Iterator[Any]:
    """transformers, without its bars and warnings; its errors about a folder are one FormatError."""
    transformers = import_transformers()
    with without_noise(transformers), loading(folder, task):
        yield transformers


@contextmanager
def loading(folder: Path, task: str) -> Iterator[None]:
    """Turn the errors of transformers for a folder that it cannot load into one FormatError; name it in OSErrors."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with name_file(folder):
            yield
    except (FormatError, PlanError):
        raise
    except (ImportError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        needs_code = "trust_remote_code" in str(error)
        why = "it needs code that is in the folder, which is not run" if needs_code else reason(error)
        raise FormatError(
            f"{folder}: found no {TUNE_TASKS[task]} that can be loaded: {why}; expected a model and a tokenizer that "
            "the installed transformers supports. Give such a model, or choose the task that it was made for"
        ) from error


def _tokenizer(transformers: Any, folder: Path) -> Tokenizer | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OURS)
    return tokenizer


def _auto_class(transformers: Any, config: Any, task: str) -> Any:
    """The class of transformers that loads the model for the task."""
    if task == "lm" and image_text_class(config) is not None:
        return transformers.AutoModelForImageTextToText
    named = {"lm": "ForCausalLM", "embedding": "", "masked_lm": "ForMaskedLM", "seq2seq": "ForSeq2SeqLM"}
    if task in named:
        return getattr(transformers, f"AutoModel{named[task]}")
    if any("ForImageClassification" in name for name in config.architectures or []):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def image_text_class(config: Any) -> Any:
    """The class for images and texts that a config is of; None for other configs.

    Some families have one config for it and for a class of texts alone: `architectures` says which of them was saved.
    """
    transformers, kind = import_transformers(), type(config)
    both = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if kind not in both:
        return None
    alone = not config.architectures and kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    saved = config.architectures or [both[kind].__name__]
    return both[kind] if both[kind].__name__ in saved and not alone else None


def _reader_of(tensors: Mapping[str, Tensor], kind: Any, config: Any) -> Callable[..., Any]:
    """`from_pretrained` of a class, fed with tensors, by their names on the disk, instead of files."""

    def read(**options: Any) -> Any:
        # the class itself: the Auto class takes no tensors without a folder
        return kind.from_pretrained(None, config=config, state_dict=dict(tensors), **options)

    return read


def _complete_model(read: Callable[..., Any], folder: Path, task: str, dtype: str) -> Any:
    """The model with every tensor from the files; without its pooler if they lack it: embeddings do not use it.

    read: from_pretrained, bound to its source.
    """

    def load(**options: bool) -> tuple[Any, list[str]]:
        model, report = read(
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **OURS,
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
            f"{folder}: the files do not hold the {TUNE_TASKS[task]} that its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nMake the config and the tensors agree; `mergekit-lfm inspect` lists the tensors"
        )
    return model


@contextmanager
def without_noise(transformers: Any) -> Iterator[None]:
    """Hide the bar for reading weights and the warnings of problems that _complete_model reports as errors."""
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
