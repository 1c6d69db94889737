"""Terms of the loss by which images are made, as pure functions of a pass: scalars, less for better images.

A term is a mean over the batch, so that weights keep their meaning for other batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.divergences import kd_divergence
from mergekit_lfm.distill.passes import Pass
from mergekit_lfm.errors import PlanError, did_you_mean

CONTRAST = 0.1  # the temperature of CMI's contrast
COMPETITION = 3.0  # the temperature of ADI's comparison
TINY = 1e-12


def bn(seen: Pass) -> Tensor:
    """The distances of the batch's means and variances from those that BatchNorm stores, summed over layers.

    Source: Yin et al. 2019, arXiv 1912.08795. Variances are divided by the number of values.
    """
    return _distances(seen.get("norms"))


def records(seen: Pass) -> Tensor:
    """The distances of means and covariances of recorded layers' inputs from the records, summed over layers.

    Source: Lopes et al. 2017, arXiv 1710.07535, as statistics of the whole batch.
    """
    return _distances(seen.get("moments"))


def _distances(pairs: tuple[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], ...]) -> Tensor:
    gaps = [a - b for found, wanted in pairs for a, b in zip(found, wanted, strict=True)]
    return torch.stack([_norm(x) for x in gaps]).sum()


def _norm(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x)
    return length


def one_hot(seen: Pass) -> Tensor:
    """Cross-entropy of the targets by the teacher; of the classes that it scores best without targets.

    Source: Chen et al. 2019, arXiv 1904.01186.
    """
    targets = seen.scores.argmax(-1) if seen.targets is None else seen.targets
    return nn.functional.cross_entropy(seen.scores, targets)


def impressions(seen: Pass) -> Tensor:
    """Cross-entropy of soft targets [n, classes] by the teacher. Source: Nayak et al. 2019, arXiv 1905.08114."""
    return nn.functional.cross_entropy(seen.scores, seen.get("targets"))


def activation(seen: Pass) -> Tensor:
    """The negative mean size of features. Source: Chen et al. 2019, arXiv 1904.01186."""
    features: Tensor = seen.get("features")
    return -features.abs().mean()


def balance(seen: Pass) -> Tensor:
    """The negative entropy, in nats, of the mean prediction: -ln(classes) if all classes are as frequent.

    Source: Chen et al. 2019, arXiv 1904.01186, there divided by the number of classes.
    """
    mean = seen.scores.softmax(-1).mean(0)
    return -_entropy(mean)


def certainty(seen: Pass) -> Tensor:
    """The mean entropy of each prediction. Source: Addepalli et al. 2019, arXiv 1912.11960."""
    return _entropy(seen.scores.softmax(-1)).mean()


def _entropy(chances: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(chances).sum(-1)
    return entropies


def adversarial_kl(seen: Pass) -> Tensor:
    """-KL(teacher, student). Source: Micaelli and Storkey 2019, arXiv 1905.09768."""
    return -kd_divergence(seen.get("student"), seen.scores) / len(seen.scores)


def adversarial_mae(seen: Pass) -> Tensor:
    """The negative mean absolute difference of scores. Source: Fang et al. 2019, arXiv 1912.11006."""
    return -kd_divergence(seen.get("student"), seen.scores, 1.0, "mae") / len(seen.scores)


def competition(seen: Pass) -> Tensor:
    """1 - the Jensen-Shannon divergence of teacher and student at temperature 3.

    Source: Yin et al. 2019, arXiv 1912.08795 (ADI); the temperature is the authors' code's.
    """
    found = kd_divergence(seen.get("student"), seen.scores, COMPETITION, "js")
    return 1 - found / COMPETITION**2 / len(seen.scores)


def total_variation(seen: Pass) -> Tensor:
    """The mean difference of neighbours in a row, and of those in a column; 2 on a checkerboard of 0 and 1."""
    x = seen.images  # [n, channels, h, w]
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def l2(seen: Pass) -> Tensor:
    """The mean square of the pixels."""
    return seen.images.square().mean()


def clusters(seen: Pass) -> Tensor:
    """The mean squared distance of features from wanted ones. Source: Bhardwaj et al. 2019, arXiv 1905.07072."""
    return nn.functional.mse_loss(seen.get("features"), seen.get("aims"))


def diversity(seen: Pass) -> Tensor:
    """How much predictions differ for a difference of images, of the batch's two halves.

    Source: Han et al. 2020, arXiv 2011.03749, with the authors' norms over the whole halves.
    """
    half = len(seen.images) // 2
    images, chances = seen.images, seen.scores.softmax(-1)
    apart = _norm(images[half : 2 * half] - images[:half])
    return _norm(chances[half : 2 * half] - chances[:half]) / (apart + TINY)


def spread(seen: Pass) -> Tensor:
    """exp(-mean over pairs of the latent numbers' distance times the images'). Source: Yoo et al. 2019, KegNet.

    Distances are Euclidean between latent numbers, and means of absolute differences between images.
    """
    z: Tensor = seen.get("latents")
    x = seen.images.flatten(1)
    far = (z[:, None] - z[None]).square().sum(-1).clamp(min=TINY).sqrt()
    apart = (x[:, None] - x[None]).abs().mean(-1)
    return (-(far * apart).mean()).exp()


def decoder(seen: Pass) -> Tensor:
    """The mean squared difference of the latent numbers from what the decoder reads in the images. Source: KegNet."""
    return nn.functional.mse_loss(seen.get("decoded"), seen.get("latents"))


def proxy(seen: Pass) -> Tensor:
    """-ln of the critic's belief that an image is one of the other data. Source: Goodfellow 2014; as in DeGAN."""
    return nn.functional.softplus(-seen.get("judged")).mean()


def contrast(seen: Pass) -> Tensor:
    """-ln of the share that a changed copy of an image has among all images, the batch's and earlier ones.

    By exp(cosine / 0.1) of projected features. Source: Fang et al. 2021, arXiv 2105.08584.
    """
    own, copies, others = (nn.functional.normalize(x, dim=-1) for x in seen.get("views"))
    scores = own @ torch.cat([copies, others]).T / CONTRAST  # [n, n + others]
    return nn.functional.cross_entropy(scores, torch.arange(len(own), device=own.device))


def boundary(seen: Pass) -> Tensor:
    """The mean squared difference of the scores of neighbours in the batch that are to be of other classes.

    Source: Braun et al. 2024, arXiv 2306.02090: pairs meet at the border between their classes.
    """
    targets: Tensor = seen.get("targets")
    other = (targets != targets.roll(1)).to(seen.scores.dtype)
    gaps = (seen.scores - seen.scores.roll(1, 0)).square().mean(-1)
    return (gaps * other).sum() / other.sum().clamp(min=1)


def gradient(seen: Pass) -> Tensor:
    """1 - cosine of the gradient and the wanted one. Source: Geiping et al. 2020, arXiv 2003.14053."""
    found, wanted = seen.get("gradients")
    return 1 - nn.functional.cosine_similarity(found, wanted, dim=0)


def gradient_l2(seen: Pass) -> Tensor:
    """The squared distance of both gradients. Source: Zhu et al. 2019, arXiv 1906.08935."""
    found, wanted = seen.get("gradients")
    return torch.square(found - wanted).sum()


def group(seen: Pass) -> Tensor:
    """The mean squared distance of copies of a batch from their mean. Source: Yin et al. 2021, arXiv 2104.07586."""
    copies = seen.images.reshape(seen.groups, -1)  # [groups, n ...]
    return (copies - copies.mean(0)).square().mean()


Term = Callable[[Pass], Tensor]
TERMS: Mapping[str, Term] = {
    term.__name__: term
    for term in (
        bn, records, one_hot, impressions, activation, balance, certainty, adversarial_kl, adversarial_mae,
        competition, total_variation, l2, clusters, diversity, spread, decoder, proxy, contrast, boundary, gradient,
        gradient_l2, group,
    )
}  # fmt: skip
COMPARING = ("adversarial_kl", "adversarial_mae", "competition")  # read the student's scores


def check_terms(terms: Mapping[str, float]) -> None:
    """Raise PlanError for terms that do not exist, and without any."""
    if not terms:
        raise PlanError(f"found no term; expected some of {', '.join(TERMS)}. Give at least one")
    for name in terms:
        if name not in TERMS:
            raise PlanError(f"found the term {name!r}; expected {', '.join(TERMS)}; {did_you_mean(name, TERMS)}")


def check_finite(loss: Tensor, place: str, learning_rate: float) -> None:
    """Raise PlanError for a loss that is not finite. place: whose it is, and where."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise PlanError(
            f"{place} is {value}; expected a finite number. Choose a lower learning rate than {learning_rate:g}, or "
            "smaller weights"
        )


def weigh(terms: Mapping[str, float], seen: Pass) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of terms, and each one by its name, without its weight."""
    values = {name: TERMS[name](seen) for name in terms}
    return torch.stack([weight * values[name] for name, weight in terms.items()]).sum(), values
