"""EZ-HOI's training loss, computed from a feature store without EZ-HOI, and what a bridge learns through it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ezhoi_diffusion.features.labels import PairLabels

ALPHA, GAMMA = 0.5, 0.2  # EZ-HOI's defaults, which all of its scripts use
KEEP = 2.0  # the squared change of logits counts as much as this many annotations


def interaction_loss(logits: Tensor, prior: Tensor, target: Tensor, valid: Tensor, positives: float) -> Tensor:
    """Focal loss (Lin et al. 2017) of the scores p = prior·sigmoid(logit), as EZ-HOI trains with.

    It is Σ |α − 1 + y|·|y − p|^γ·(−log |1 − y − p|) over the valid (pair, class), divided by the number of positives. EZ-HOI
    counts these in each batch. A fixed number makes the mean over batches the loss of all pairs.

    Args:
        logits: [N, C].
        prior: [N], detector scores from 0 to 1.
        target: [N, C] bool, y.
        valid: [N, C] bool; the others do not count.
        positives: The number of targets to expect among N pairs.

    Returns:
        [], differentiable by the logits.
    """
    prior = prior.unsqueeze(1)
    log_right = prior.log() + logsigmoid(logits)  # log p; as logarithms, no score rounds to 0 or 1
    log_wrong = torch.logaddexp(torch.log1p(-prior) + logsigmoid(logits), logsigmoid(-logits))  # log (1 - p)
    log_found, log_missed = (torch.where(target, a, b) for a, b in ((log_right, log_wrong), (log_wrong, log_right)))
    weight = torch.where(target, ALPHA, 1 - ALPHA).to(logits.dtype)  # not the default dtype
    loss = -weight * (GAMMA * log_missed).exp() * log_found
    return torch.where(valid, loss, 0.0).sum() / positives


def bridge_loss(bridged: Tensor, visual: Tensor, labels: PairLabels, positives: float, keep: float) -> Tensor:
    """EZ-HOI's training loss of what bridged features score, plus `keep` times the squared change of all logits, per positive.

    The second term counts every class of every pair. Classes without a loss, such as those that the split hides, are held where
    EZ-HOI has them: without it, what separates seen classes moves the others at random. With `keep` = `KEEP`/(annotations to
    learn from), it weighs less the more there is to learn from.

    Args:
        bridged: [N, D], differentiable.
        visual: [N, D], the features before the bridge.
        labels: Those of the N pairs, on the same device.
        positives: As in `interaction_loss`.
        keep: The weight of the change.

    Returns:
        [].
    """
    logits = bridged @ labels.class_weight.T
    change = logits - visual @ labels.class_weight.T
    loss = interaction_loss(logits, labels.prior, labels.target, labels.valid, positives)
    return loss + keep * change.square().sum() / positives
