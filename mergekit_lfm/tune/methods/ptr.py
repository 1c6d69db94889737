"""PTR: a classification by the words that a masked language model has for the places of a template."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.attachment import Attachment
    from mergekit_lfm.tune.work import Prepared, TuneWork


def rules(work: TuneWork) -> Prepared:
    """A class is the words that it has, one for each place. Source: Han et al. 2021, arXiv 2105.11259, section 3.

    p(class) is the product over places of p(word), among the words that classes have there, over the sum of these
    products. The loss is -ln p(class), and the mean over places of -ln p(word), as in the authors' code. Trained are
    the vectors of the template's words, from their embeddings on; unlike the authors', not the model.
    """
    from mergekit_lfm.artifacts.attachment import TEMPLATE, Attachment, AttachmentInfo
    from mergekit_lfm.artifacts.rules import read_rules
    from mergekit_lfm.runtime.templates import Templated, first_vectors, lay_out
    from mergekit_lfm.train.losses import with_words
    from mergekit_lfm.tune.work import Prepared

    if len(work.files) != 1:
        raise PlanError(f"template: found {len(work.files)} files, expected one, with a template and its classes")
    own = read_rules(work.files[0])
    layout = lay_out(own, work.tokenizer)
    for x in work.model.parameters():
        x.requires_grad_(False)
    model = Templated(work.model, layout, first_vectors(work.model, layout))

    def take() -> Attachment:
        return Attachment(AttachmentInfo("ptr", TEMPLATE, asdict(own)), {"values": model.values.detach().contiguous()})

    return Prepared(model, attachment=take, virtual=layout.count, loss=lambda loss: with_words(loss, len(layout.words)))


METHODS = (
    TuneMethod(
        "ptr",
        "Han et al. 2021, arXiv 2105.11259",
        "the words of a template around texts, where a masked language model's words make the class",
        "template",
        rules,
        1e-2,
        (
            Parameter(
                "template",
                None,
                kind="str",
                unset="required",
                doc="a YAML file of a template, as '{text} This is [MASK].', and of classes, a list of words for each",
            ),
        ),
        files="template",
        loads="masked_lm",
    ),
)
