"""Batches, noise and splits are functions of seed and number."""

import pytest
import torch

from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.batches import batch_indices, timesteps_and_noise


def test_every_epoch_visits_every_feature_once():
    stream = torch.cat([batch_indices(10, 4, seed=3, batch=k) for k in range(15)])
    for epoch in stream.split(10):
        assert epoch.sort().values.tolist() == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    assert batch_indices(10, 4, seed=4, batch=0).tolist() != stream[:4].tolist()


def test_a_batch_may_be_larger_than_an_epoch():
    counts = batch_indices(60, 64, seed=0, batch=0).bincount(minlength=60)
    assert counts.sum() == 64
    assert counts.min() == 1
    assert len(batch_indices(60, 64, seed=0, batch=7)) == 64
    assert batch_indices(5, 64, seed=0, batch=0).bincount().tolist() == pytest.approx([13] * 5, abs=1)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (100, 7)])
def test_an_epoch_is_permuted_once(monkeypatch, count, size):
    epochs = [torch.randperm(count, generator=generator(99, "order", k)) for k in range(1 + 20 * size // count)]
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or real(*args, **kwargs))
    batches = [batch_indices(count, size, seed=99, batch=k) for k in range(20)]
    assert torch.equal(torch.cat(batches), torch.cat(epochs)[: 20 * size])
    assert len(drawn) <= len(epochs)
    last = batches[-1].clone()
    batches[-1].zero_()
    assert torch.equal(batch_indices(count, size, seed=99, batch=19), last)


def test_noise_depends_on_seed_and_batch_only():
    state = torch.get_rng_state()
    first, again = timesteps_and_noise((8, 4), 1000, 0, 5), timesteps_and_noise((8, 4), 1000, 0, 5)
    other = timesteps_and_noise((8, 4), 1000, 0, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_the_validation_mask_depends_on_the_count_and_grows_with_the_share():
    tenth, third = validation_mask(40, 0.1), validation_mask(40, 0.33)
    assert (int(tenth.sum()), int(third.sum())) == (4, 13)
    assert torch.equal(tenth, validation_mask(40, 0.1))
    assert not (tenth & ~third).any()
    assert not torch.equal(tenth, validation_mask(40, 0.1, seed=1))


def test_the_validation_mask_leaves_something_on_both_sides():
    assert validation_mask(2, 0.01).sum() == 1
    assert validation_mask(2, 0.99).sum() == 1
    with pytest.raises(ValueError, match="at least 2"):
        validation_mask(1, 0.5)
