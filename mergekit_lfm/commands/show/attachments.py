"""Show bottleneck adapters: a file's, and averages."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.attachment import PROMPTS, TEMPLATE
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.attachments import Averaged
    from mergekit_lfm.api.export_attached import Exported
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.artifacts.attachment import Attachment


def attachment_data(attachment: Attachment) -> dict[str, Any]:
    """A bottleneck adapter for JSON."""
    return {
        **asdict(attachment.info),
        "replaced": [*attachment.info.replaced],
        "numbers": sum(x.numel() for x in attachment.tensors.values()),
    }


def attachment_text(data: dict[str, Any]) -> str:
    """`attachment_data` in lines."""
    settings = {name: " and ".join(map(str, v)) if isinstance(v, list) else v for name, v in data["config"].items()}
    name = {PROMPTS: "mixture of prompts", TEMPLATE: "template"}.get(data["form"], "bottleneck adapter")
    rows = [
        (name, f"{data['method']}, {data['numbers']:,} numbers; runs with its model alone"),
        ("model", str(data["base"])),
        ("settings", ", ".join(f"{name} {value}" for name, value in settings.items())),
        ("in place of", ", ".join(data["replaced"])),
    ]
    return table([row for row in rows if row[1]])


def exported_data(outcome: Outcome[Exported]) -> dict[str, Any]:
    """An exported model for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def exported_text(outcome: Outcome[Exported]) -> str:
    """How the model is loaded."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    exported = outcome.result
    return table([("load", f'{exported.auto}.from_pretrained("{outcome.path}", trust_remote_code=True)')])


def done_data(outcome: Outcome[Averaged]) -> dict[str, Any]:
    """An average for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[Averaged]) -> str:
    """The shares in an average."""
    if outcome.already_there:
        return "already there: the average of the same request; nothing was done"
    shares = " + ".join(f"{share:.4g}" for share in outcome.result.shares)
    return table([("averaged", f"{outcome.result.tensors} tensors, {shares}")])
