"""`edit_model`: from a saved model and facts to a patch that teaches them, judged as its files hold it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.changes import changes_data, rounding_warnings
from mergekit_lfm.api.efficacy import check_efficacy, is_enough, load_for_texts, note_scores, score
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.patches import Applied, apply_patches, has_changed, undo_file
from mergekit_lfm.api.repeats import is_repeated
from mergekit_lfm.artifacts.facts import FactsFile, as_facts
from mergekit_lfm.artifacts.patch import Patch, open_patch, read_patch_info
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.replace import check_folder
from mergekit_lfm.recipe.edit import edit_options
from mergekit_lfm.recipe.files import paths_in
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.places import check_file
from mergekit_lfm.version import versions
from mergekit_lfm.views.adapted import open_model

if TYPE_CHECKING:
    from mergekit_lfm.edit.scores import FactScores
    from mergekit_lfm.runtime.load import Loaded

Facts = StrPath | FactsFile | Mapping[str, Any] | Sequence[Any]  # as `as_facts` takes them


@dataclass(frozen=True, slots=True)
class Edited:
    """The result of an edit. patch: as its file holds it. changes: the size of the change of each tensor, as data.

    before, after: the scores of the model and of the edited one on the facts, None if they were not judged. saved: the
    outcome of applying the patch, None without `save`. good: False if the edited model says a smaller share of the
    facts than `min_efficacy`. changed: False if the patch gives no tensor another value.
    """

    patch: Patch
    changes: tuple[Mapping[str, Any], ...]
    before: FactScores | None = None
    after: FactScores | None = None
    saved: Outcome[Applied] | None = None
    good: bool = True
    changed: bool = True


def edit_model(
    model: StrPath,
    facts: Facts,
    out: StrPath | None = None,
    *,
    method: str = "memit",
    stats: StrPath | None = None,
    preset: str | None = None,
    config: StrPath | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    save: StrPath | None = None,
    verify: bool = True,
    min_efficacy: float | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
    **options: Any,
) -> Outcome[Edited]:
    """Change facts that a saved model says, and write the change as a patch. The model stays as it is.

    facts: a facts file, or its data. out: the patch file to write, None for none. stats: the file of second moments of
    the model that `collect_stats("gram", ...)` writes, or leave it out and give covariance="identity". preset, options:
    constants of the method, as in a recipe's `edits` ("lambda" is `lambda_`). config: a YAML file of options; those
    given here go first. dtype, device: of the running model. save: a folder for the edited model. verify: score the
    model before and after on the facts, after from the files. min_efficacy: the smallest share of the facts that the
    edited model must say. If `out` holds the patch of the same request already, it is not made again.

    The outcome's digest is that of the patch's content. Raises PlanError for options that do not fit, facts that
    cannot be taught and outputs that are in the way; ImportError if transformers is not installed.
    """
    started = time.monotonic()
    check_efficacy(min_efficacy, verify=verify)
    chosen = _read_options(method, preset, config, options)
    _check_statistics(stats, chosen)
    known, folder = as_facts(facts), model_folder(model)
    file, target = (None if path is None else expand(path) for path in (out, save))
    statistics = None if stats is None else _open_gram(expand(stats, "stats"))
    inputs = [*paths_in(folder), *(expand(x) for x in (facts, stats, config) if isinstance(x, str | Path))]
    request = _Request(method, edit_options(method, chosen, place="edit"), known, statistics)
    there = is_repeated(file, partial(request.differences, folder), overwrite=overwrite)
    _check_places(inputs, file, target, there, overwrite)
    loaded = load_for_texts(folder, dtype, device)
    there = there and is_repeated(file, partial(_running_differences, request, loaded), overwrite=overwrite)
    patch = open_patch(file) if there and file is not None else _solve(loaded, request, chosen, file, progress)
    before = score(loaded, known, "judging", progress) if verify else None  # the model is as it was
    del loaded
    saved = None
    if target is not None and file is not None:
        saved = apply_patches(folder, [file], target, verify=False, overwrite=overwrite, progress=progress)
    after = _judge(folder, patch, target, known, dtype, device, progress) if verify else None
    if target is not None and after is not None:
        note_scores(target, after)
    source = open_model(folder)
    changes = changes_data(patch, source)
    good, changed = is_enough(after, min_efficacy), has_changed(source, patch)
    edited = Edited(patch, tuple(changes), before, after, saved, good, changed)
    digest = None if file is None else open_checkpoint(file).content
    already = there and (saved is None or saved.already_there)
    return Outcome(file, edited, digest, already, warn_of(rounding_warnings(changes)), time.monotonic() - started)


@dataclass(frozen=True)
class _Request:
    """Everything that a patch's header says of the request. options: the value of each, as `edit_options` gives it."""

    method: str
    options: Mapping[str, Any]
    facts: FactsFile
    statistics: Statistics | None

    def differences(self, model: Path, file: Path) -> list[str]:
        """The parts of a patch file's header that another request made.

        Default layers, the device and the model's dtype are left out: they show when the model is loaded.
        """
        info = read_patch_info(file)
        gram = self.statistics
        covariance = "identity" if gram is None else f"gram of data {gram.info.data}"
        wanted = {**self.options, "covariance": covariance, "dtype": "float64"}
        known = {name: value for name, value in info.options.items() if name not in ("device", "model_dtype")}
        if wanted["layers"] is None:
            wanted["layers"] = known.get("layers")
        compared = {
            "method": info.method == self.method,
            "model": info.base == open_model(model).content,
            "facts": info.facts == self.facts.as_data(),
            "options": known == json.loads(json.dumps(wanted)),
            "versions": info.versions == versions("torch"),
        }
        return [name for name, same in compared.items() if not same]


def _check_statistics(stats: StrPath | None, chosen: Mapping[str, Any]) -> None:
    """Raise PlanError unless either statistics are given or the options do without."""
    if (stats is None) != (chosen.get("covariance") == "identity"):
        raise PlanError(
            'give --stats FILE (stats=FILE), or --identity (covariance="identity") to edit without statistics'
        )


def _read_options(
    method: str, preset: str | None, config: StrPath | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of the file and those given here, which go first, by their names in YAML. Checks them all."""
    from mergekit_lfm.store.files import read_text
    from mergekit_lfm.store.yaml import read_yaml

    chosen: dict[str, Any] = {}
    if config is not None:
        file = expand(config, "config")
        content = read_yaml(read_text(file), str(file))
        if not isinstance(content, dict):
            raise PlanError(f"{file}: found {content!r:.60}, expected options of `edit`, such as `steps: 25`")
        chosen |= content
    own = {"lambda" if name == "lambda_" else name: value for name, value in options.items() if value is not None}
    if "lambda" in own or "lambda_ratio" in own:  # the two set one constant
        chosen = {name: value for name, value in chosen.items() if name not in ("lambda", "lambda_ratio")}
    chosen |= own | ({} if preset is None else {"preset": preset})
    edit_options(method, chosen, place=str(config or "edit"))
    return chosen


def _open_gram(path: Path) -> Statistics:
    statistics = open_statistics(path)
    if statistics.info.kind != "gram":
        raise PlanError(
            f"{path} holds {statistics.info.kind} statistics, expected second moments of the model's layers; collect "
            "them with `mergekit-lfm stats gram`"
        )
    return statistics


def _running_differences(request: _Request, loaded: Loaded, file: Path) -> list[str]:
    """The parts of a patch file's header that differ from this request for the model as it is loaded."""
    from mergekit_lfm.edit.sites import find_sites
    from mergekit_lfm.edit.solve import running_dtype, select_sites

    known = read_patch_info(file).options
    layers = [site.layer for site in select_sites(find_sites(loaded.model), request.method, request.options["layers"])]
    kind = next(loaded.model.parameters()).device.type
    same_options = known["layers"] == layers and known.get("device", "cpu") == kind
    same_dtype = known.get("model_dtype", "float32") == running_dtype(loaded.model)
    return ([] if same_options else ["options"]) + ([] if same_dtype else ["dtype"])


def _check_places(inputs: list[Path], file: Path | None, save: Path | None, there: bool, overwrite: bool) -> None:
    """Raise PlanError, before the work, if an output must not be written."""
    if file is not None:
        check_file(file, inputs, overwrite=overwrite or there)
    if save is None:
        return
    if file is None:
        raise PlanError("save applies a patch file, which `out` names; give `out`, too")
    if file.resolve().is_relative_to(save.resolve()):
        raise PlanError(f"the patch {file} would lie in the folder {save}, which is written, too; choose another")
    replace = overwrite or there  # an earlier run may have written it; `execute` compares
    check_folder(save, {str(path): path for path in inputs}, overwrite=replace)
    check_file(undo_file(save), inputs, overwrite=replace)


def _solve(
    loaded: Loaded, request: _Request, chosen: Mapping[str, Any], file: Path | None, progress: Progress
) -> Patch:
    """The patch, as a file holds it."""
    from mergekit_lfm.edit.solve import edit

    options = {name: value for name, value in chosen.items() if name != "covariance"}
    covariance = "identity" if request.statistics is None else request.statistics
    with progress.by_count(" facts", "editing") as count:
        patch = edit(
            loaded, None, request.facts, method=request.method, covariance=covariance, progress=count, **options
        )
    if file is not None:
        patch.save(file)
        return open_patch(file)
    with TemporaryDirectory() as folder:
        patch.save(Path(folder) / "patch.safetensors")
        return open_patch(Path(folder) / "patch.safetensors")


def _judge(
    folder: Path, patch: Patch, save: Path | None, facts: FactsFile, dtype: str, device: str, progress: Progress
) -> FactScores:
    """The scores of the edited model as its files hold it: those of the new folder, or of the model and the patch."""
    from mergekit_lfm.views.patched import patched_view

    edited = patched_view(open_model(folder), patch) if save is None else save
    return score(load_for_texts(edited, dtype, device), facts, "verifying", progress)
