"""Tuning by bottleneck adapters: small modules that run between the parts of each layer, while the model stays.

A classifier's head is trained with them, and is in their file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter
from mergekit_lfm.runtime.tasks import HEADED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from mergekit_lfm.artifacts.attachment import Attachment
    from mergekit_lfm.train.losses import Loss
    from mergekit_lfm.tune.work import Prepared, TuneWork

BOTH, FEED_FORWARD = ("attention", "ffn"), ("ffn",)
PLAIN: Mapping[str, Any] = {"scale": 1.0, "beside": False}

SIZE = Parameter("size", 16, kind="int", minimum=1, doc="units of an adapter, between its two matrices")


def _prepare(
    method: str, form: str, places: Sequence[str], activation: str, **fixed: Any
) -> Callable[[TuneWork], Prepared]:
    """A method by the form of its modules, their places, and what else of their config the user does not choose."""

    def prepare(work: TuneWork) -> Prepared:
        """The model with new modules."""
        from mergekit_lfm.runtime.attach import install
        from mergekit_lfm.tune.work import Prepared

        config = {**PLAIN, "places": [*places], "activation": activation, **fixed, **work.options}
        facts = {"method": method, "form": form, "config": config}
        head = _head(work)
        attached = install(work.model, form, config)
        work.train(attached.names | head)
        return Prepared(work.model, attachment=lambda: _take(work, head, attached.parameters, **facts))

    return prepare


def _head(work: TuneWork) -> frozenset[str]:
    """The parameters of a classifier's head."""
    return work.head if work.task in HEADED else frozenset()


def _take(work: TuneWork, head: frozenset[str], tensors: Mapping[str, Tensor], **facts: Any) -> Attachment:
    """The tensors of modules, and the head, as an attachment."""
    from mergekit_lfm.artifacts.attachment import Attachment, AttachmentInfo

    heads = {name: x for name, x in work.model.named_parameters() if name in head}
    whole = {name: x.detach().contiguous() for name, x in {**tensors, **heads}.items()}
    return Attachment(AttachmentInfo(**facts, replaced=tuple(heads)), whole)


def mixture(work: TuneWork) -> Prepared:
    """Several adapters, two halves at random for each step and layer, and two passes that are to predict the same.

    Source: Wang et al. 2022, arXiv 2205.12410, section 3. Their average is the result, as in equation 9.
    """
    from mergekit_lfm.runtime.attach import install
    from mergekit_lfm.runtime.bottlenecks import Mixture
    from mergekit_lfm.train.losses import SCORES, consistent
    from mergekit_lfm.tune.work import Prepared

    if work.task not in SCORES:
        raise PlanError(f"adamix compares predictions of classes or tokens, which {work.task} has not; choose another")
    plain = {**PLAIN, "places": [*FEED_FORWARD], "activation": "gelu", "size": work.options["size"]}
    head, weight = _head(work), work.options["consistency"]
    assert isinstance(weight, float)
    attached = install(work.model, "mixture", {**plain, "experts": work.options["experts"]})
    work.train(attached.names | head)

    def average() -> Attachment:
        means = {at: module.averaged() for at, module in attached.modules.items() if isinstance(module, Mixture)}
        tensors = {f"{at}.{name}": x for at, mean in means.items() for name, x in mean.items()}
        return _take(work, head, tensors, method="adamix", form="bottleneck", config=plain)

    def loss(task: Loss) -> Loss:
        return consistent(task, SCORES[work.task], weight)

    return Prepared(work.model, attachment=average, loss=loss)


def fusion(work: TuneWork) -> Prepared:
    """Attention over adapters of other tasks, which stay. Source: Pfeiffer et al. 2020, arXiv 2005.00247, section 3.2.

    Their heads are left out: the head is trained anew.
    """
    import torch

    from mergekit_lfm.runtime.attach import install
    from mergekit_lfm.tune.work import Prepared

    others = _open_plain(work)
    config = {
        **PLAIN,
        "places": others[0].info.config["places"],
        "adapters": [dict(other.info.config) for other in others],
    }
    head = _head(work)
    attached = install(work.model, "fusion", config)
    with torch.no_grad():
        for name, x in attached.parameters.items():
            at, found, rest = name.partition(".adapters.")
            if found:
                number, _, own = rest.partition(".")
                x.copy_(others[int(number)].tensors[f"{at}.{own}"])
    frozen = {name for name in attached.names if ".adapters." in name}
    work.train((attached.names - frozen) | head)
    facts = {"method": "adapter_fusion", "form": "fusion", "config": config}
    return Prepared(work.model, attachment=lambda: _take(work, head, attached.parameters, **facts))


def _open_plain(work: TuneWork) -> list[Attachment]:
    """The files of the parameter `adapters`, as plain bottlenecks. Raises PlanError for those that cannot be fused."""
    from mergekit_lfm.artifacts.attachment import open_attachment
    from mergekit_lfm.runtime.attach import check_base, expand_attachment

    others = [open_attachment(path) for path in work.files]
    for path, other in zip(work.files, others, strict=True):
        check_base(other, work.content, path)
    plain = [expand_attachment(other) for other in others]
    first = plain[0].info.config
    for path, other in zip(work.files, plain, strict=True):
        info = other.info
        if info.form != "bottleneck" or info.config["beside"] or info.config["places"] != first["places"]:
            raise FormatError(
                f"adapters: {path} is by {info.method}; expected adapters by pfeiffer, or all by houlsby or compacter, "
                "after the same parts of each layer. Give such files"
            )
    if len(plain) < 2:
        raise PlanError("adapters: found one file, expected two or more, which are weighed; add some")
    return plain


METHODS = (
    TuneMethod(
        "houlsby",
        "Houlsby et al. 2019, arXiv 1902.00751",
        "a small module after attention and one after the feed-forward part of each layer",
        "attachment",
        _prepare("houlsby", "bottleneck", BOTH, "gelu"),
        1e-3,
        (SIZE,),
    ),
    TuneMethod(
        "pfeiffer",
        "Pfeiffer et al. 2020, arXiv 2005.00247",
        "a small module after the feed-forward part of each layer alone",
        "attachment",
        _prepare("pfeiffer", "bottleneck", FEED_FORWARD, "relu"),
        1e-3,
        (SIZE,),
    ),
    TuneMethod(
        "parallel",
        "He et al. 2021, arXiv 2110.04366; Jiang et al. 2023, arXiv 2303.00690",
        "a small module beside the feed-forward part of each layer, from the same input, times a scale",
        "attachment",
        _prepare("parallel", "bottleneck", FEED_FORWARD, "relu", beside=True),
        1e-3,
        (SIZE, Parameter("scale", 4.0, above=0, doc="a factor of the module's result")),
    ),
    TuneMethod(
        "compacter",
        "Karimi Mahabadi et al. 2021, arXiv 2106.04647",
        "as houlsby, each matrix a sum of Kronecker products, with factors that all layers share",
        "attachment",
        _prepare("compacter", "compact", BOTH, "gelu"),
        3e-3,
        (
            SIZE,
            Parameter("rules", 4, kind="int", minimum=1, doc="Kronecker products of a matrix; divides its two widths"),
            Parameter("factor_rank", 1, kind="int", minimum=1, doc="rank of the factors that each module has itself"),
        ),
    ),
    TuneMethod(
        "adamix",
        "Wang et al. 2022, arXiv 2205.12410",
        "as pfeiffer, several at each place; each step draws one, and their average is the result",
        "attachment",
        mixture,
        1e-3,
        (
            SIZE,
            Parameter("experts", 4, kind="int", minimum=2, doc="modules at each place"),
            Parameter("consistency", 1.0, minimum=0, doc="weight of how far the predictions of two passes are apart"),
        ),
    ),
    TuneMethod(
        "adapter_fusion",
        "Pfeiffer et al. 2020, arXiv 2005.00247",
        "attention over modules of other tasks, which stay, for each token and layer",
        "attachment",
        fusion,
        5e-4,
        (Parameter("adapters", None, kind="str", unset="required", doc="files of other methods here, with commas"),),
        files="adapters",
    ),
)
