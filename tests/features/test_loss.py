"""EZ-HOI's training loss, and that of bridges, against direct formulas."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion.features.labels import pair_labels
from ezhoi_diffusion.features.loss import bridge_loss, interaction_loss
from ezhoi_diffusion.testing import synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train")


@pytest.fixture(scope="module")
def labels(store):
    return pair_labels(store)[:]


@pytest.fixture(scope="module")
def visual(store):
    return store.adapter_feat()


def focal(score, label, alpha=0.5, gamma=0.2):
    """Focal loss of one score, as Lin et al. (2017) write it."""
    right, weight = (score, alpha) if label else (1 - score, 1 - alpha)
    return -weight * (1 - right) ** gamma * torch.log(right)


def test_the_loss_is_focal_over_what_counts(visual, labels):
    logits = (visual @ labels.class_weight.T).double()
    scores = labels.prior.double().unsqueeze(1) * logits.sigmoid()
    expected = sum(focal(scores[i, c], labels.target[i, c]) for i, c in labels.valid.nonzero().tolist())
    found = interaction_loss(logits, labels.prior.double(), labels.target, labels.valid, 7.0)
    torch.testing.assert_close(found, expected / 7, rtol=1e-9, atol=0)


def test_its_gradient_is_that_of_finite_differences(visual, labels):
    logits = (visual @ labels.class_weight.T)[:12].double().requires_grad_()
    own = labels.prior[:12].double(), labels.target[:12], labels.valid[:12]
    assert torch.autograd.gradcheck(lambda z: interaction_loss(z, *own, 3.0), logits)


def test_sure_scores_keep_loss_and_gradient_finite():
    logits = torch.tensor([[80.0, -80.0], [200.0, -200.0]], requires_grad=True)
    target, valid = torch.tensor([[False, True], [True, False]]), torch.ones(2, 2, dtype=torch.bool)
    loss = interaction_loss(logits, torch.tensor([1.0, 0.3]), target, valid, 2.0)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0.1, "a false positive of score 1 is pushed down"
    assert logits.grad[0, 1] < -0.1, "a missed positive of score 0 is pushed up"


def test_what_is_not_valid_has_no_gradient(visual, labels):
    logits = (visual @ labels.class_weight.T).requires_grad_()
    interaction_loss(logits, labels.prior, labels.target, labels.valid, 1.0).backward()
    assert not logits.grad[~labels.valid].any()
    assert logits.grad[labels.valid].all()


def test_a_bridge_is_held_near_the_logits_of_every_class(visual, labels):
    move = torch.randn(visual.shape, generator=torch.Generator().manual_seed(0))
    bridged = visual + 0.1 * move
    logits = bridged @ labels.class_weight.T
    alone = interaction_loss(logits, labels.prior, labels.target, labels.valid, 5.0)
    change = (0.1 * move @ labels.class_weight.T).square().sum() / 5
    torch.testing.assert_close(bridge_loss(bridged, visual, labels, 5.0, keep=3.0), alone + 3 * change)
    torch.testing.assert_close(
        bridge_loss(visual, visual, labels, 5.0, keep=3.0), bridge_loss(visual, visual, labels, 5.0, keep=0.0)
    )
