"""attach(), and bridges inside EZ-HOI."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ezhoi_diffusion import Bridge, BridgePlugin, EzhoiDiffusionError, attach, hookimpl
from ezhoi_diffusion.bridge import as_bridge, fingerprint_differences
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.ezhoi.comparison_pass import _association, _average_precision
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap, FeatureTapError, find_feature_module
from ezhoi_diffusion.ezhoi.fingerprint import context_vectors, fingerprint, restore_context
from ezhoi_diffusion.ezhoi.run import EzHoiRun, FingerprintError
from ezhoi_diffusion.plugins import PluginError, PluginManager


class Echo(nn.Module):
    """The identity denoiser."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return x


def logits_of(ezhoi, mocker, inject):
    spy = mocker.spy(type(ezhoi.model), "postprocessing")
    with torch.no_grad(), FeatureTap(ezhoi.model, inject=inject):
        for image, target in zip(ezhoi.images, ezhoi.targets, strict=True):
            ezhoi.model([image], [target])
    found = [x for call in spy.call_args_list for x in call.args[4]]
    mocker.stop(spy)
    return found


@pytest.mark.parametrize("recipe", ["gentle", "paper"])
def test_identity_denoiser_leaves_logits_unchanged(ezhoi, mocker, recipe):
    seen = []
    with torch.no_grad(), FeatureTap(ezhoi.model, observe=lambda pairs, x, text, logits: seen.append((x, text))):
        for image, target in zip(ezhoi.images, ezhoi.targets, strict=True):
            ezhoi.model([image], [target])
    from ezhoi_diffusion.features.statistics import ModalityStatistics

    text = next(text for _, text in seen if text is not None)
    statistics = ModalityStatistics.compute((x for x, _ in seen), text)
    bridge = DiffusionBridge(BridgeConfig(text.shape[1], RECIPES[recipe], "echo"), Echo(), statistics)
    before = logits_of(ezhoi, mocker, lambda x, pairs: None)
    after = logits_of(ezhoi, mocker, lambda x, pairs: bridge(x))
    assert len(before) == len(after) > 5
    scale = max(float(a.abs().max()) for a in before)
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) < 1e-5 * max(scale, 1)


class Scaled(Bridge):
    settings = ("factor",)

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, adapter_feat, pairs=None):
        return self.factor * adapter_feat


def test_a_setting_reaches_the_enabled_bridges_that_have_it(ezhoi, use):
    use(scaled=BridgePlugin("scaled", lambda folder: Scaled()), plain=BridgePlugin("plain", lambda folder: lambda x: x))
    ezhoi.args.plugin = ["plain", "scaled"]
    ezhoi.args.plugin_folders = {"plain": "", "scaled": ""}
    with attach(ezhoi.model, ezhoi.args):
        same = detect(ezhoi)
    ezhoi.args.set = ["factor=2"]
    with attach(ezhoi.model, ezhoi.args):
        doubled = detect(ezhoi)
    assert not all(torch.equal(a["scores"], b["scores"]) for a, b in zip(same, doubled, strict=True))
    ezhoi.args.set = ["typo=2"]
    with pytest.raises(EzhoiDiffusionError, match="no enabled bridge has a setting typo"):
        attach(ezhoi.model, ezhoi.args)


def bridge_of(provenance, context=None):
    """A bridge with this provenance and these context vectors."""
    bridge = as_bridge(lambda x: x)
    bridge.provenance, bridge.context = provenance, context or {}
    return bridge


def detect(ezhoi):
    with torch.no_grad():
        return [d for i, t in zip(ezhoi.images, ezhoi.targets, strict=True) for d in ezhoi.model([i], [t]) or []]


def test_nothing_is_attached_if_nothing_is_enabled(ezhoi):
    before = detect(ezhoi)
    attachment = attach(ezhoi.model, ezhoi.args)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ezhoi.model.modules()) == 0
    after = detect(ezhoi)
    attachment.detach()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)


def test_attach_without_add_arguments_is_an_error(ezhoi):
    with pytest.raises(EzhoiDiffusionError, match="call add_arguments"):
        attach(ezhoi.model, Namespace(eval=True))


def test_enabling_a_plugin_without_run_hooks_is_an_error(ezhoi, use):
    use(gives=SimpleNamespace(register_bridges=hookimpl(lambda register: register("gives", lambda folder: None))))
    with pytest.raises(EzhoiDiffusionError, match="--plugin gives has no effect on a run"):
        attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "plugin": ["gives"]}))


def test_on_attach_and_on_detach_are_called_once(ezhoi, use):
    events = []
    plugin = SimpleNamespace(
        on_attach=hookimpl(lambda run: events.append(("attach", run.args.zs_type))),
        on_detach=hookimpl(lambda run: events.append(("detach", run.failed))),
        post_adapter_feat=hookimpl(lambda adapter_feat, pairs: adapter_feat * 2),
    )
    use(doubles=plugin)
    ezhoi.args.plugin = ["doubles"]
    bare = detect(ezhoi)
    with attach(ezhoi.model, ezhoi.args) as attachment:
        doubled = detect(ezhoi)
    attachment.detach()
    assert events == [("attach", "unseen_verb"), ("detach", False)]
    assert not all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, doubled, strict=True))
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, detect(ezhoi), strict=True))


def test_on_detach_is_called_after_a_failure(ezhoi, use):
    events = []
    use(p=SimpleNamespace(on_attach=hookimpl(lambda: 1 / 0), on_detach=hookimpl(lambda run: events.append(run.failed))))
    ezhoi.args.plugin = ["p"]
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        attach(ezhoi.model, ezhoi.args)
    assert events == [True]


def test_injection_without_any_image_is_an_error(ezhoi, use):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: None)))
    ezhoi.args.plugin = ["p"]
    with pytest.raises(FeatureTapError, match="never ran in eval mode"), attach(ezhoi.model, ezhoi.args):
        pass


def require_ended_and_degraded(ezhoi, problem):
    """The plugin p ends the run with this problem, or is switched off, and the detections are those of EZ-HOI alone."""
    bare = detect(ezhoi)
    with (
        pytest.raises(PluginError, match=rf"plugin 'p'.*post_adapter_feat: {problem}"),
        attach(ezhoi.model, ezhoi.args),
    ):
        detect(ezhoi)
    ezhoi.args.plugin_errors = "disable"
    with attach(ezhoi.model, ezhoi.args):
        degraded = detect(ezhoi)
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, degraded, strict=True))


def test_invalid_replacement_ends_or_degrades_the_run(ezhoi, use, capsys):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat[:-1])))
    ezhoi.args.plugin = ["p"]
    require_ended_and_degraded(ezhoi, "returned shape")
    assert "DEGRADED: plugin 'p'" in capsys.readouterr().out


def through_numpy(adapter_feat):
    adapter_feat.numpy()[:] = 0


def into_pairs(adapter_feat, pairs):
    pairs.scores.zero_()


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda adapter_feat: [adapter_feat.zero_(), None][1], "adapter_feat"),
        (lambda adapter_feat: adapter_feat.mul_(2), "adapter_feat"),
        (lambda adapter_feat: [adapter_feat.data.neg_(), None][1], "adapter_feat"),
        (lambda adapter_feat: [adapter_feat.t_(), None][1], "adapter_feat"),
        (through_numpy, "adapter_feat"),
        (into_pairs, r"pairs\.scores"),
    ],
)
def test_a_plugin_that_writes_into_what_it_gets_ends_or_degrades_the_run(ezhoi, use, write, what):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(write)))
    ezhoi.args.plugin = ["p"]
    require_ended_and_degraded(ezhoi, f"it writes into {what}")


def test_sys_exit_in_a_hook_is_an_error_of_its_plugin(ezhoi, use):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: sys.exit(0))))
    ezhoi.args.plugin = ["p"]
    with (
        pytest.raises(PluginError, match=r"plugin 'p'.*post_adapter_feat: raised SystemExit: 0"),
        attach(ezhoi.model, ezhoi.args),
    ):
        detect(ezhoi)


@pytest.mark.parametrize("answer", [5, "mem_adapter", ("mem_adapter",), ("mem_adapter", None), (None, nn.Identity())])
def test_an_answer_of_locate_adapter_feat_that_is_no_module_is_refused(ezhoi, use, answer):
    use(
        fork=SimpleNamespace(locate_adapter_feat=hookimpl(lambda model: answer)),
        seen=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat + 1)),
    )
    ezhoi.args.plugin = ["fork", "seen"]
    with pytest.raises(PluginError, match=r"plugin 'fork'.*locate_adapter_feat: returned .*not a name and a module"):
        attach(ezhoi.model, ezhoi.args)


def test_locate_adapter_feat_names_the_module_of_a_fork(ezhoi, use):
    ezhoi.model.pair_adapter = ezhoi.model.mem_adapter
    del ezhoi.model.mem_adapter
    type(ezhoi.model).mem_adapter = property(lambda self: self.pair_adapter)
    try:
        use(
            fork=SimpleNamespace(locate_adapter_feat=hookimpl(lambda model: ("pair_adapter", model.pair_adapter))),
            seen=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat + 1)),
        )
        ezhoi.args.plugin = ["fork", "seen"]
        with attach(ezhoi.model, ezhoi.args) as attachment:
            detect(ezhoi)
        assert attachment.run.hook_point.name == "pair_adapter"
    finally:
        del type(ezhoi.model).mem_adapter


def test_capture_without_an_engine_is_an_error(ezhoi, use):
    use(p=SimpleNamespace(on_train_batch=hookimpl(lambda batch: None)))
    ezhoi.args.plugin = ["p"]
    with pytest.raises(EzhoiDiffusionError, match=r"run main_tip_finetune\.py"):
        attach(ezhoi.model, ezhoi.args)


def test_only_the_first_bridge_restores_its_context(ezhoi):
    vectors = {name: vector.clone() for name, vector in context_vectors(ezhoi.model).items()}
    stored = fingerprint(ezhoi.model, ezhoi.args).to_dict()
    ezhoi.args.restore_context = True
    run = EzHoiRun(ezhoi.model, ezhoi.args, None, PluginManager(discover=False), find_feature_module(ezhoi.model))
    own = bridge_of({"fingerprint": stored}, vectors)
    other = bridge_of(
        {"fingerprint": {**stored, "context": "other"}}, {name: vector + 1 for name, vector in vectors.items()}
    )
    run.check_fingerprint(own, "own")
    with pytest.raises(FingerprintError, match="context is"):
        run.check_fingerprint(other, "other")
    assert all(torch.equal(v, vectors[n]) for n, v in context_vectors(ezhoi.model).items())


@pytest.mark.parametrize("provenance", [{}, {"fingerprint": ["x"]}])
def test_unreadable_fingerprint_is_refused(ezhoi, provenance):
    run = EzHoiRun(ezhoi.model, ezhoi.args, None, PluginManager(discover=False), find_feature_module(ezhoi.model))
    with pytest.raises(FingerprintError, match="was made for another EZ-HOI run"):
        run.check_fingerprint(bridge_of(provenance), "odd")
    run.check_fingerprint(bridge_of(None), "fits every run")


def test_errors_of_a_bridge_name_it():
    plugins = PluginManager(discover=False)
    for name, load in (("breaks", lambda folder: 1 / 0), ("late", lambda folder: lambda x: x / "0")):
        hook = hookimpl(lambda register, name=name, load=load: register(name, load))
        plugins.register(SimpleNamespace(register_bridges=hook), name)
    options = {"check": lambda bridge, name: None, "device": "cpu"}
    with pytest.raises(EzhoiDiffusionError, match=r"'breaks'.*ZeroDivisionError"):
        resolve_variants("breaks", plugins, **options)
    late = resolve_variants("late", plugins, **options)["late"]
    with pytest.raises(EzhoiDiffusionError, match="bridge 'late' raised TypeError"):
        late.apply(torch.ones(2, 2), None)


def test_mean_shift_needs_only_statistics(ezhoi, tmp_path):
    """A bridge whose network comes from a plugin that is not installed still has means."""
    from ezhoi_diffusion.builtin.mean_shift import load
    from ezhoi_diffusion.features.statistics import ModalityStatistics

    visual, text = torch.randn(50, 8) + 1, torch.randn(9, 8) - 1
    statistics = ModalityStatistics.compute([visual], text)
    DiffusionBridge(BridgeConfig(8, RECIPES["gentle"], "echo"), Echo(), statistics).save_pretrained(tmp_path)
    shifted = load(tmp_path)(visual)
    assert torch.allclose(shifted.norm(dim=-1), visual.norm(dim=-1), atol=1e-5)
    after = ModalityStatistics.compute([shifted], text)
    assert after.gap < 0.5 * statistics.gap


def test_pocket_meter_is_used_where_available(mocker):
    """pocket's interface, as EZ-HOI calls it."""
    made = []

    class Meter:
        def __init__(self, num_cls, num_gt, nproc, algorithm):
            made.append((num_cls, num_gt, nproc, algorithm))
            self.kept = []

        def append(self, scores, classes, labels):
            self.kept.append(scores)

        def eval(self):
            print("WARNING: noise")
            return torch.tensor([float(len(self.kept))])

    association = mocker.Mock(return_value=torch.ones(1))
    pocket = SimpleNamespace(
        utils=SimpleNamespace(DetectionAPMeter=Meter, BoxPairAssociation=lambda min_iou: association)
    )
    mocker.patch.dict("sys.modules", {"pocket": pocket})
    scored = Scored(torch.ones(1), torch.zeros(1, dtype=torch.long), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert _average_precision(scored, torch.tensor([3]), "11P").tolist() == [1]
    assert made == [(1, [3], 1, "11P")]
    assert _association()("gt", "detected", "scores").tolist() == [1]
    assert association.call_args.args == ("gt", "detected", "scores")


# -- fingerprint -----------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_weights_context_and_split(ezhoi, make_ezhoi):
    own = fingerprint(ezhoi.model, ezhoi.args)
    assert fingerprint_differences(own.to_dict(), fingerprint(ezhoi.model, ezhoi.args).to_dict()) == {}
    stored = {name: vector.clone() for name, vector in context_vectors(ezhoi.model).items()}
    assert stored
    with torch.no_grad():
        ezhoi.model.clip_head.prompt_learner.txtcls_ctx_pt[0][0, 0] += 1
    assert set(fingerprint_differences(own.to_dict(), fingerprint(ezhoi.model, ezhoi.args).to_dict())) == {"context"}
    restore_context(ezhoi.model, stored)
    assert fingerprint_differences(own.to_dict(), fingerprint(ezhoi.model, ezhoi.args).to_dict()) == {}
    with torch.no_grad():
        ezhoi.model.vis_fuse[0].bias[0] += 1e-6
    assert set(fingerprint_differences(own.to_dict(), fingerprint(ezhoi.model, ezhoi.args).to_dict())) == {"weights"}
    other = make_ezhoi(zs_type="rare_first")
    assert {"zs_type", "weights"} <= set(
        fingerprint_differences(own.to_dict(), fingerprint(other.model, other.args).to_dict())
    )
    with pytest.raises(ValueError, match="do not fit"):
        restore_context(ezhoi.model, {})
