"""The feature tap sees what the model uses, and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch

from ezhoi_diffusion.bridge import replacement_problem
from ezhoi_diffusion.ezhoi.feature_tap import (
    FeatureTap,
    FeatureTapError,
    HookPoint,
    find_feature_module,
    unwrap,
)


def detect(ezhoi, batch=1):
    """Detections of all images with pairs, `batch` images at a time."""
    found = []
    with torch.no_grad():
        for i in range(0, len(ezhoi.images), batch):
            found += ezhoi.model(ezhoi.images[i : i + batch], ezhoi.targets[i : i + batch]) or []
    return [d for d in found if len(d["scores"])]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("batch", [1, 4])
def test_observed_features_and_pairs_equal_those_of_ezhoi(ezhoi, batch, mocker):
    seen, logits, pairings = [], [], []
    spy = mocker.spy(type(ezhoi.model), "postprocessing")
    with FeatureTap(ezhoi.model, observe=lambda *event: seen.append(event)) as tap:
        detect(ezhoi, batch)
    for call in spy.call_args_list:
        _, _boxes, humans, others, logit, *_ = call.args
        logits += logit
        pairings += [torch.stack(p) for p in zip(humans, others, strict=True)]
    with_pairs = [event for event in seen if len(event[0])]
    assert len(with_pairs) == len(logits) == tap.hits
    assert len(seen) == len(ezhoi.images)
    assert len(with_pairs) < len(seen), "the world must have images without pairs"
    label, lens, scale = ezhoi.model.label_HO, ezhoi.model.sample_lens_HO, ezhoi.model.logit_scale_HO
    for (_, x, text, own), expected in zip(with_pairs, logits, strict=True):
        assert torch.equal((x @ text.T) @ label / lens / 2 * scale, expected)
        assert torch.equal(own, expected)
    assert sum(len(x) for _, x, *_ in seen) == sum(p.shape[1] for p in pairings)
    for (pairs, *_), pairing in zip(with_pairs, [p for p in pairings if p.shape[1]], strict=True):
        assert torch.equal(pairs.pairing, pairing)
    assert [pairs.image for pairs, *_ in seen] == [target["filename"] for target in ezhoi.targets]


@pytest.mark.parametrize("batch", [1, 4])
def test_tap_leaves_detections_bit_equal(ezhoi, batch):
    bare, state = detect(ezhoi, batch), list(ezhoi.model.state_dict())
    with FeatureTap(ezhoi.model, observe=lambda *event: None):
        observed = detect(ezhoi, batch)
        assert list(ezhoi.model.state_dict()) == state
    with FeatureTap(ezhoi.model, inject=lambda x, pairs: None):
        silent = detect(ezhoi, batch)
    with FeatureTap(ezhoi.model, inject=lambda x, pairs: x.clone()):
        identity = detect(ezhoi, batch)
    assert same(bare, observed)
    assert same(bare, silent)
    assert same(bare, identity)
    assert same(bare, detect(ezhoi, batch))
    assert hooks_of(ezhoi.model) == 0
    assert "compute_roi_embeddings" not in vars(ezhoi.model)


def test_injected_features_are_scored(ezhoi, mocker):
    spy = mocker.spy(type(ezhoi.model), "postprocessing")
    detect(ezhoi)
    with FeatureTap(ezhoi.model, inject=lambda x, pairs: x * 2):
        detect(ezhoi)
    calls = [call.args[4] for call in spy.call_args_list]
    half = len(calls) // 2
    assert half
    for bare, doubled in zip(calls[:half], calls[half:], strict=True):
        assert all(torch.equal(a * 2, b) for a, b in zip(bare, doubled, strict=True))


def test_tap_is_inactive_in_training_mode(ezhoi):
    ezhoi.model.train()
    calls = []
    with FeatureTap(ezhoi.model, inject=lambda x, pairs: calls.append(pairs)) as tap:
        ezhoi.model(ezhoi.images[:4], ezhoi.targets[:4])
    assert calls == []
    with pytest.raises(FeatureTapError, match="never ran in eval mode"):
        tap.require_hits()


def test_remove_takes_only_its_own_hooks(ezhoi):
    others = ezhoi.model.mem_adapter.register_forward_hook(lambda *a: None)
    with pytest.raises(RuntimeError, match="inside"), FeatureTap(ezhoi.model, inject=lambda x, pairs: x):
        raise RuntimeError("inside")
    assert hooks_of(ezhoi.model) == 1
    tap = FeatureTap(ezhoi.model, inject=lambda x, pairs: x).attach()
    tap.remove()
    tap.remove()
    assert hooks_of(ezhoi.model) == 1
    others.remove()


def test_next_image_is_correct_after_an_exception(ezhoi):
    bare, broken = detect(ezhoi), [True]

    def inject(x, pairs):
        if broken.pop():
            raise ValueError("bad bridge")

    with FeatureTap(ezhoi.model, inject=inject):
        with pytest.raises(ValueError, match="bad bridge"):
            detect(ezhoi)
        broken.extend([False] * 99)
        assert same(bare, detect(ezhoi))


def test_registers_all_or_nothing(ezhoi, mocker):
    mocker.patch("ezhoi_diffusion.ezhoi.feature_tap.replaced", side_effect=RuntimeError("no"))
    with pytest.raises(RuntimeError, match="no"):
        FeatureTap(ezhoi.model, inject=lambda x, pairs: x).attach()
    assert hooks_of(ezhoi.model) == 0


def test_two_taps_can_be_removed_in_any_order(ezhoi):
    bare = detect(ezhoi)
    outer, inner = (FeatureTap(ezhoi.model, inject=lambda x, pairs: x + 1).attach() for _ in range(2))
    assert not same(bare, detect(ezhoi))
    outer.remove()
    inner.remove()
    assert same(bare, detect(ezhoi))


def test_vis_fuse_is_tapped_without_img_align(make_ezhoi):
    ezhoi = make_ezhoi(drop=("--img_align",))
    assert find_feature_module(ezhoi.model).name == "vis_fuse"
    bare = detect(ezhoi)
    with FeatureTap(ezhoi.model, inject=lambda x, pairs: x.clone()) as tap:
        assert same(bare, detect(ezhoi))
    assert tap.hits == len(bare)


def test_text_is_read_after_txt_align(make_ezhoi, mocker):
    ezhoi = make_ezhoi("--txt_align")
    torch.nn.init.normal_(ezhoi.model.txtmem_adapter.up_proj_mem.weight, std=0.1)
    spy = mocker.spy(type(ezhoi.model), "postprocessing")
    seen = []
    with FeatureTap(ezhoi.model, observe=lambda *event: seen.append(event)):
        detect(ezhoi)
    logits = [x for call in spy.call_args_list for x in call.args[4]]
    rows = [(x, text) for pairs, x, text, _ in seen if len(pairs)]
    m = ezhoi.model
    for (x, text), expected in zip(rows, logits, strict=True):
        assert torch.equal((x @ text.T) @ m.label_HO / m.sample_lens_HO / 2 * m.logit_scale_HO, expected)


def test_unsuitable_models_are_refused(ezhoi):
    assert unwrap(ezhoi.model) is ezhoi.model
    with pytest.raises(FeatureTapError, match="DataParallel"):
        unwrap(torch.nn.DataParallel(ezhoi.model))
    with pytest.raises(FeatureTapError, match="compiled before attach"):
        unwrap(torch.compile(ezhoi.model))
    inline = copy.deepcopy(ezhoi.model)
    del inline.mem_adapter, inline.vis_fuse
    inline.logits_type = "U"
    with pytest.raises(FeatureTapError, match=r"--logits_type U and without --img_align .* inline"):
        find_feature_module(inline)
    with pytest.raises(FeatureTapError, match="is this an EZ-HOI detector"):
        find_feature_module(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one role"):
        FeatureTap(ezhoi.model)
    with pytest.raises(FeatureTapError, match="no compute_roi_embeddings"):
        FeatureTap(torch.nn.Linear(2, 2), inject=lambda x, p: x, point=HookPoint("x", torch.nn.Linear(2, 2))).attach()


class ToContext(torch.nn.Module):
    """An adapter that attends to a context, or to its own input."""

    def __init__(self, mem_adpt_self):
        super().__init__()
        self.mem_adpt_self = mem_adpt_self

    def forward(self, x, prior=None):
        context = x if self.mem_adpt_self else prior
        return x + torch.softmax(x @ context.transpose(-1, -2), -1) @ context


class Sister(torch.nn.Module):
    """A detector shaped as HOLa: `mem_adapter` adapts class texts to the image, and pairs meet them after `vis_fuse`."""

    def __init__(self, mem_adpt_self=False):
        super().__init__()
        self.mem_adapter, self.vis_fuse, self.img_align = ToContext(mem_adpt_self), torch.nn.Linear(8, 4), True
        self.texts = torch.randn(6, 4)

    def compute_roi_embeddings(self, features, image_size, region_props):
        texts = self.mem_adapter(self.texts.unsqueeze(1), features.flatten(1).mean(-1).expand(6, 1, -1)).squeeze(1)
        return [self.vis_fuse(torch.cat([props["boxes"], props["boxes"]], dim=1)) @ texts.T for props in region_props]


def test_a_sister_that_adapts_texts_is_refused_before_it_runs():
    sister = Sister()
    sister.compute_roi_embeddings(torch.randn(4, 3, 3), None, [{"boxes": torch.rand(6, 4)}])  # as many pairs as texts
    with pytest.raises(FeatureTapError, match=r"Sister does not attend to its own input.*locate_adapter_feat"):
        find_feature_module(sister)
    with pytest.raises(FeatureTapError, match="HOLa"):
        FeatureTap(sister, inject=lambda x, pairs: x)
    assert find_feature_module(Sister(mem_adpt_self=True)).name == "mem_adapter"
    point = HookPoint("vis_fuse", sister.vis_fuse)
    assert FeatureTap(sister, inject=lambda x, pairs: x, point=point).point is point, "a plugin may know better"


def test_fork_with_other_pairs_is_refused(ezhoi):
    short = HookPoint("short", torch.nn.Identity())
    with (
        FeatureTap(ezhoi.model, inject=lambda x, pairs: x, point=short),
        pytest.raises(FeatureTapError, match="pairs differently"),
    ):
        detect(ezhoi)


@pytest.mark.parametrize("role", ["inject", "observe"])
def test_a_deep_copy_of_a_hooked_model_has_its_own_weights_and_no_hooks(ezhoi, role):
    bare = detect(ezhoi)
    calls = []
    taps = {"inject": lambda x, pairs: calls.append(1) or torch.zeros_like(x), "observe": lambda *a: calls.append(1)}
    original = ezhoi.model
    with FeatureTap(original, **{role: taps[role]}):
        detect(ezhoi)
        seen = len(calls)
        average = copy.deepcopy(original)
        ezhoi.model = average
        copied = detect(ezhoi)
        with torch.no_grad():
            for parameter in average.mem_adapter.parameters():
                parameter.add_(0.5)
        moved = detect(ezhoi)
        ezhoi.model = original
        assert len(calls) == seen
        detect(ezhoi)
        assert len(calls) == 2 * seen > 0
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, copied, strict=True))
    assert any(not torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, moved, strict=True))


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        (None, "NoneType, not a plain tensor"),
        (torch.ones(3, 2), r"shape torch.Size\(\[3, 2\]\)"),
        (torch.ones(2, 2, dtype=torch.float64), "dtype torch.float64"),
        (torch.tensor([[1.0, float("nan")], [float("inf"), 1]]), "2 values that are not finite"),
        (torch.ones(2, 2, device="meta"), "device meta"),
        (torch.nn.Parameter(torch.zeros(2, 2)), "Parameter, not a plain tensor"),
        (torch.zeros(2, 2), None),
    ],
)
def test_replacement_problem(after, problem):
    import re

    found = replacement_problem(torch.ones(2, 2), after)
    assert (found is None) == (problem is None)
    assert problem is None or re.search(problem, found)
