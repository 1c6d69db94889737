"""Make new models out of saved ones: merge, align and edit checkpoint files, in bounded memory.

Importing this package imports no torch; its functions do when they are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit_lfm.version import __version__

__all__ = [
    "METHODS",
    "Attachment",
    "Batch",
    "Checkpoint",
    "Fact",
    "FactScores",
    "FactsFile",
    "Finding",
    "FormatError",
    "Interpolation",
    "Loaded",
    "Outcome",
    "Patch",
    "PlanError",
    "Recipe",
    "Refusal",
    "Statistics",
    "Symmetries",
    "Transform",
    "Units",
    "__version__",
    "accuracy",
    "add_head",
    "align_models",
    "apply_patches",
    "as_batches",
    "as_facts",
    "as_gradient",
    "audit",
    "average_attachments",
    "barrier",
    "check_table",
    "collect_stats",
    "correlation",
    "distill_model",
    "edit_model",
    "emulate_model",
    "evaluate_models",
    "evaluate_routed",
    "explain_plan",
    "export_attached",
    "export_patches",
    "extract_lora",
    "find_symmetries",
    "find_transform",
    "generate_texts",
    "init_recipe",
    "inspect_file",
    "load_model",
    "make_student",
    "measure_barrier",
    "merge",
    "merge_adapter_recipe",
    "merge_adapters",
    "merge_state_dicts",
    "merge_tensors",
    "meta_from_teachers",
    "meta_train",
    "open_attachment",
    "open_checkpoint",
    "open_patch",
    "open_statistics",
    "open_transform",
    "patched_view",
    "perplexity",
    "plan_adapters",
    "plan_merge",
    "plan_recipe",
    "plug_in_ends",
    "push",
    "random_transform",
    "read_data",
    "read_facts_file",
    "read_table",
    "repair_model",
    "repair_module",
    "retrieval",
    "rewrite",
    "run_recipe",
    "save_samples",
    "score_facts",
    "select_examples",
    "synthesise",
    "synthesise_images",
    "trace_facts",
    "tune_model",
    "undo_patches",
    "verify_output",
]

if TYPE_CHECKING:
    from mergekit_lfm.align.elements import random_transform
    from mergekit_lfm.align.find import find_transform
    from mergekit_lfm.api.adapter_plans import plan_adapters
    from mergekit_lfm.api.adapters import merge_adapter_recipe, merge_adapters
    from mergekit_lfm.api.align import align_models, check_table
    from mergekit_lfm.api.attachments import average_attachments
    from mergekit_lfm.api.distill import distill_model
    from mergekit_lfm.api.edit import edit_model
    from mergekit_lfm.api.explain import explain_plan
    from mergekit_lfm.api.export import export_patches
    from mergekit_lfm.api.export_attached import export_attached
    from mergekit_lfm.api.extract import extract_lora
    from mergekit_lfm.api.generate import generate_texts
    from mergekit_lfm.api.heads import add_head
    from mergekit_lfm.api.init import init_recipe
    from mergekit_lfm.api.inspect import inspect_file
    from mergekit_lfm.api.judge import evaluate_models, measure_barrier, repair_model
    from mergekit_lfm.api.merge import merge
    from mergekit_lfm.api.merge_plans import plan_merge
    from mergekit_lfm.api.meta import meta_train
    from mergekit_lfm.api.meta_teachers import meta_from_teachers
    from mergekit_lfm.api.offsite import emulate_model, plug_in_ends
    from mergekit_lfm.api.outcome import Finding, Outcome
    from mergekit_lfm.api.patches import apply_patches, undo_patches
    from mergekit_lfm.api.push import push
    from mergekit_lfm.api.recipes import plan_recipe, run_recipe
    from mergekit_lfm.api.route import evaluate_routed
    from mergekit_lfm.api.select import select_examples
    from mergekit_lfm.api.state_dicts import merge_state_dicts
    from mergekit_lfm.api.stats import collect_stats
    from mergekit_lfm.api.students import make_student
    from mergekit_lfm.api.synthesise import synthesise_images
    from mergekit_lfm.api.tensors import merge_tensors
    from mergekit_lfm.api.trace import trace_facts
    from mergekit_lfm.api.tune import tune_model
    from mergekit_lfm.api.verify import verify_output
    from mergekit_lfm.arch.registry import find_symmetries
    from mergekit_lfm.arch.table import Symmetries, Units, read_table
    from mergekit_lfm.artifacts.attachment import Attachment, open_attachment
    from mergekit_lfm.artifacts.facts import Fact, FactsFile, as_facts, read_facts_file
    from mergekit_lfm.artifacts.patch import Patch, open_patch
    from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
    from mergekit_lfm.artifacts.transform import Transform, open_transform
    from mergekit_lfm.distill.leakage import as_gradient, audit, correlation
    from mergekit_lfm.distill.samples import save_samples
    from mergekit_lfm.distill.synthesise import synthesise
    from mergekit_lfm.edit.scores import FactScores, score_facts
    from mergekit_lfm.errors import FormatError, PlanError, Refusal
    from mergekit_lfm.judge.barrier import Interpolation, barrier
    from mergekit_lfm.judge.evaluate import accuracy, perplexity, retrieval
    from mergekit_lfm.methods.registry import METHODS
    from mergekit_lfm.recipe.recipe import Recipe
    from mergekit_lfm.repair.modules import repair_module
    from mergekit_lfm.runtime.batches import Batch, as_batches
    from mergekit_lfm.runtime.data import read_data
    from mergekit_lfm.runtime.load import Loaded, load_model
    from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
    from mergekit_lfm.views.patched import patched_view
    from mergekit_lfm.views.rewritten import rewrite

# The module of each public name, which is imported when the name is first used.
_HOMES = {
    "Attachment": "artifacts.attachment",
    "Batch": "runtime.batches",
    "Checkpoint": "store.checkpoint",
    "Fact": "artifacts.facts",
    "FactScores": "edit.scores",
    "FactsFile": "artifacts.facts",
    "Finding": "api.outcome",
    "FormatError": "errors",
    "Interpolation": "judge.barrier",
    "Loaded": "runtime.load",
    "METHODS": "methods.registry",
    "Outcome": "api.outcome",
    "Patch": "artifacts.patch",
    "PlanError": "errors",
    "Recipe": "recipe.recipe",
    "Refusal": "errors",
    "Statistics": "artifacts.statistics",
    "Symmetries": "arch.table",
    "Transform": "artifacts.transform",
    "Units": "arch.table",
    "accuracy": "judge.evaluate",
    "add_head": "api.heads",
    "align_models": "api.align",
    "apply_patches": "api.patches",
    "as_batches": "runtime.batches",
    "as_facts": "artifacts.facts",
    "average_attachments": "api.attachments",
    "export_attached": "api.export_attached",
    "barrier": "judge.barrier",
    "check_table": "api.align",
    "collect_stats": "api.stats",
    "distill_model": "api.distill",
    "edit_model": "api.edit",
    "emulate_model": "api.offsite",
    "evaluate_models": "api.judge",
    "evaluate_routed": "api.route",
    "explain_plan": "api.explain",
    "export_patches": "api.export",
    "extract_lora": "api.extract",
    "find_symmetries": "arch.registry",
    "find_transform": "align.find",
    "generate_texts": "api.generate",
    "init_recipe": "api.init",
    "inspect_file": "api.inspect",
    "load_model": "runtime.load",
    "make_student": "api.students",
    "measure_barrier": "api.judge",
    "merge": "api.merge",
    "merge_adapter_recipe": "api.adapters",
    "merge_adapters": "api.adapters",
    "merge_state_dicts": "api.state_dicts",
    "meta_from_teachers": "api.meta_teachers",
    "meta_train": "api.meta",
    "merge_tensors": "api.tensors",
    "open_attachment": "artifacts.attachment",
    "open_checkpoint": "store.checkpoint",
    "open_patch": "artifacts.patch",
    "open_statistics": "artifacts.statistics",
    "open_transform": "artifacts.transform",
    "patched_view": "views.patched",
    "perplexity": "judge.evaluate",
    "plan_adapters": "api.adapter_plans",
    "plan_merge": "api.merge_plans",
    "plan_recipe": "api.recipes",
    "plug_in_ends": "api.offsite",
    "push": "api.push",
    "random_transform": "align.elements",
    "read_data": "runtime.data",
    "read_facts_file": "artifacts.facts",
    "read_table": "arch.table",
    "repair_model": "api.judge",
    "repair_module": "repair.modules",
    "retrieval": "judge.evaluate",
    "rewrite": "views.rewritten",
    "run_recipe": "api.recipes",
    "score_facts": "edit.scores",
    "select_examples": "api.select",
    "synthesise_images": "api.synthesise",
    "trace_facts": "api.trace",
    "tune_model": "api.tune",
    "undo_patches": "api.patches",
    "synthesise": "distill.synthesise",
    "save_samples": "distill.samples",
    "audit": "distill.leakage",
    "as_gradient": "distill.leakage",
    "correlation": "distill.leakage",
    "verify_output": "api.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
