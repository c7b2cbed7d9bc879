"""Closed forms against dense solutions and scikit-learn, and what texts are worth."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.labels import LabelledPairs
from ezhoi_diffusion.scoring.linear import (
    SHRINKAGE,
    eszsl_map,
    fit_eszsl,
    fit_gaussian_classes,
    gaussian_map,
    load_eszsl,
    load_gaussian_classes,
)
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
    """Pairs of five seen classes, one for each, and of background; two classes have no labels."""
    own = torch.randint(SEEN + 1, (4000,), generator=draw)  # the last is background
    target = torch.nn.functional.one_hot(own, CLASSES).bool() & (own < SEEN)[:, None]
    visual = target.double() @ texts @ truth + 0.3 * torch.randn(4000, DIM, generator=draw, dtype=torch.double)
    valid = (torch.arange(CLASSES) < SEEN).repeat(4000, 1)
    rest = torch.ones(4000), torch.zeros(4000, dtype=torch.long), torch.zeros(0)
    return LabelledPairs(visual.float(), target, valid, *rest)


def test_eszsl_is_the_minimum_of_its_loss(pairs, texts):
    """Σ (Y − X V Sᵀ)² + γ|V Sᵀ|² + λ|X V|² + γλ|V|² (their equation 3), whose minimum needs no formula."""
    centre, found = eszsl_map(pairs, texts)
    x, s = pairs.visual.double() - centre, texts[:SEEN]
    y = pairs.target[:, :SEEN].double()
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


def test_gaussian_classes_are_linear_discriminant_analysis(pairs, texts):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    centre, found = gaussian_map(pairs, texts)
    own = torch.where(pairs.target.any(1), pairs.target.double().argmax(1), SEEN)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(
        pairs.visual.double().numpy(), own.numpy()
    )
    expected = torch.from_numpy(model.coef_[:SEEN] - model.coef_[SEEN]).T
    torch.testing.assert_close(found[:, :SEEN], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(centre, torch.from_numpy(model.means_[SEEN]))


@pytest.mark.parametrize("closed_form", [eszsl_map, gaussian_map])
def test_unseen_classes_are_told_by_their_texts(closed_form, pairs, texts, truth, draw):
    centre, found = closed_form(pairs, texts)
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
