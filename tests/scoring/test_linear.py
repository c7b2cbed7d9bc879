"""Closed forms against dense solutions and scikit-learn, and what texts are worth."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.labels import PairLabels
from ezhoi_diffusion.scoring.linear import (
    SHRINKAGE,
    eszsl_map,
    fit_eszsl,
    fit_gaussian_classes,
    gaussian_map,
    load_eszsl,
    load_gaussian_classes,
)
from ezhoi_diffusion.scoring.moments import LabelMoments, Scatter, std_of
from ezhoi_diffusion.testing import reloaded

FITS = [(fit_eszsl, load_eszsl), (fit_gaussian_classes, load_gaussian_classes)]
DIM, CLASSES, SEEN = 6, 7, 5


@pytest.fixture(scope="module")
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def texts(draw):
    return torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=draw, dtype=torch.double))


@pytest.fixture(scope="module")
def truth(draw):
    """The mean of each class, as a map of its text."""
    return torch.randn(DIM, DIM, generator=draw, dtype=torch.double)


@pytest.fixture(scope="module")
def pairs(draw, texts, truth):
    """Features and labels of five seen classes, one for each pair, and of background; two classes have no labels."""
    own = torch.randint(SEEN + 1, (4000,), generator=draw)  # the last is background
    target = torch.nn.functional.one_hot(own, CLASSES).bool() & (own < SEEN)[:, None]
    visual = target.double() @ texts @ truth + 0.3 * torch.randn(4000, DIM, generator=draw, dtype=torch.double)
    valid = (torch.arange(CLASSES) < SEEN).repeat(4000, 1)
    rest = torch.ones(4000), torch.zeros(4000, dtype=torch.long), torch.zeros(0)
    return visual.float(), PairLabels(target, valid, *rest)


def of_rows(labels, rows):
    per_pair = (labels.target, labels.valid, labels.prior, labels.image)
    return PairLabels(*(x[rows] for x in per_pair), labels.class_weight)


@pytest.fixture(scope="module")
def moments(pairs):
    """Of the pairs in blocks, one of which is empty and one without background."""
    visual, labels = pairs
    background = (~labels.target.any(1)).nonzero().squeeze(1)
    annotated = labels.target.any(1).nonzero().squeeze(1)
    blocks = (annotated[:900], background[:0], torch.cat([background, annotated[900:]]))
    return reduce(add, (LabelMoments.of(visual[rows], of_rows(labels, rows)) for rows in blocks))


def test_eszsl_is_the_minimum_of_its_loss(pairs, moments, texts):
    """Σ (Y − X V Sᵀ)² + γ|V Sᵀ|² + λ|X V|² + γλ|V|² (their equation 3), whose minimum needs no formula."""
    centre, found = eszsl_map(moments, texts)
    visual, labels = pairs
    x, s = visual.double() - centre, texts[:SEEN]
    y = labels.target[:, :SEEN].double()
    y = (y - y.mean(0)) / y.std(0, correction=0)
    gamma, lam = (m.diagonal().mean() for m in (x.T @ x, s.T @ s))
    v = torch.zeros(DIM, DIM, dtype=torch.double, requires_grad=True)

    def loss(v):
        fit = (y - x @ v @ s.T).square().sum()
        return fit + gamma * (v @ s.T).square().sum() + lam * (x @ v).square().sum() + gamma * lam * v.square().sum()

    optimizer = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(v)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(v.detach() @ texts.T, found, rtol=1e-4, atol=1e-6)


def test_gaussian_classes_are_linear_discriminant_analysis(pairs, moments, texts):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    centre, found = gaussian_map(moments, texts)
    visual, labels = pairs
    own = torch.where(labels.target.any(1), labels.target.double().argmax(1), SEEN)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(visual.double().numpy(), own.numpy())
    expected = torch.from_numpy(model.coef_[:SEEN] - model.coef_[SEEN]).T
    torch.testing.assert_close(found[:, :SEEN], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(centre, torch.from_numpy(model.means_[SEEN]))


@pytest.mark.parametrize("closed_form", [eszsl_map, gaussian_map])
def test_unseen_classes_are_told_by_their_texts(closed_form, moments, texts, truth, draw):
    centre, found = closed_form(moments, texts)
    unseen = torch.arange(SEEN, CLASSES).repeat(500)
    x = texts[unseen] @ truth + 0.3 * torch.randn(1000, DIM, generator=draw, dtype=torch.double)
    among = ((x - centre) @ found)[:, SEEN:]
    assert (among.argmax(1) + SEEN == unseen).double().mean() > 0.8


@pytest.mark.parametrize(("fit", "load"), FITS)
def test_the_map_is_added_to_the_logits(fit, load, store):
    score, x = EzHoiScore.from_store(store), store.adapter_feat()
    bridge = reloaded(fit(store, weight=1.0), load)
    added = (x.double() - bridge.centre) @ bridge.map
    torch.testing.assert_close(score.logits(bridge(x)), score.logits(x) + added.float(), rtol=0, atol=1e-3)
    assert float(added.std()) == pytest.approx(float(score.logits(x).std()), rel=1e-4)


@pytest.mark.parametrize(("fit", "load"), FITS)
def test_texts_of_other_classes_make_a_baseline(fit, load, store):
    bridge, permuted = (reloaded(fit(store, permute_texts=flag), load) for flag in (False, True))
    assert (bridge.baseline, permuted.baseline) == (False, True)
    assert not torch.equal(bridge.map, permuted.map)
    with pytest.raises(BridgeError, match="permute_texts"):
        fit(store, permute_texts="yes")


def test_scatters_of_blocks_add_up_without_cancellation(draw):
    x = torch.randn(3000, 4, generator=draw, dtype=torch.double) + 1e7  # squares around 0 would keep two digits
    parts = [Scatter.of(block) for block in x.split([1, 0, 999, 2000])]
    total = reduce(add, parts)
    centred = x - x.mean(0)
    assert total.count == 3000
    torch.testing.assert_close(total.products, centred.T @ centred, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(total.mean, x.mean(0), rtol=1e-14, atol=0)
    linear = torch.randn(4, 3, generator=draw, dtype=torch.double)
    torch.testing.assert_close(total.std_of(linear, x[0]), ((x - x[0]) @ linear).std(), rtol=1e-7, atol=0)
    torch.testing.assert_close(std_of(x.split([7, 0, 2993])), x.std(), rtol=1e-7, atol=0)
    assert std_of([x[:0], x[0, :1]]) == 0


def test_pairs_with_several_labels_count_once_for_each(draw, texts):
    """Against the sums over all (pair, label), written out."""
    visual = torch.randn(200, DIM, generator=draw, dtype=torch.double).float()
    target = torch.rand(200, CLASSES, generator=draw) < torch.linspace(0.05, 0.4, CLASSES)
    target[:, -1] = False
    rest = torch.ones(200), torch.zeros(200, dtype=torch.long), torch.zeros(0)
    labels = PairLabels(target, torch.ones_like(target), *rest)
    moments = reduce(
        add, (LabelMoments.of(visual[rows], of_rows(labels, rows)) for rows in torch.arange(200).split(64))
    )
    x, (row, column) = visual.double(), target.nonzero().unbind(1)
    background = x[~target.any(1)]
    mean = torch.stack([x[target[:, c]].mean(0) if target[:, c].any() else x[0] for c in range(CLASSES)])
    within = torch.cat([background - background.mean(0), x[row] - mean[column]])
    covariance = within.T @ within / len(within)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(DIM).double()
    _, found = gaussian_map(moments, texts)
    expected = torch.linalg.inv(covariance) @ (mean - background.mean(0)).T
    assert (target.sum(1) > 1).any()
    torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=1e-9, atol=1e-12)
