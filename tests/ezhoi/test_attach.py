"""attach(), as a fork's script calls it, and the bridge inside the host."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ezhoi_diffusion import EzhoiDiffusionError, attach, hookimpl
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.ezhoi.comparison_pass import _association, _average_precision
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap, FeatureTapError, find_feature_module
from ezhoi_diffusion.ezhoi.fingerprint import context_vectors, differences, fingerprint, restore_context
from ezhoi_diffusion.ezhoi.run import EzHoiRun, FingerprintError
from ezhoi_diffusion.plugins import PluginError, PluginManager


class Echo(nn.Module):
    """The identity denoiser."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return x


@pytest.fixture
def host(make_ezhoi):
    return make_ezhoi()


def logits_of(host, mocker, inject):
    spy = mocker.spy(type(host.model), "postprocessing")
    with torch.no_grad(), FeatureTap(host.model, inject=inject):
        for image, target in zip(host.images, host.targets, strict=True):
            host.model([image], [target])
    found = [x for call in spy.call_args_list for x in call.args[4]]
    mocker.stop(spy)
    return found


@pytest.mark.parametrize("recipe", ["gentle", "paper"])
def test_with_an_identity_denoiser_the_host_s_logits_do_not_move(host, mocker, recipe):
    seen = []
    with torch.no_grad(), FeatureTap(host.model, observe=lambda pairs, x, text, logits: seen.append((x, text))):
        for image, target in zip(host.images, host.targets, strict=True):
            host.model([image], [target])
    from ezhoi_diffusion.features.statistics import ModalityStatistics

    text = next(text for _, text in seen if text is not None)
    statistics = ModalityStatistics.of((x for x, _ in seen), text)
    bridge = DiffusionBridge(BridgeConfig(text.shape[1], RECIPES[recipe], "echo"), Echo(), statistics)
    before = logits_of(host, mocker, lambda x, pairs: None)
    after = logits_of(host, mocker, lambda x, pairs: bridge(x))
    assert len(before) == len(after) > 5
    scale = max(float(a.abs().max()) for a in before)
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) < 1e-5 * max(scale, 1)


@pytest.fixture
def use(mocker):
    """Make attach find these plugins: use(name=object)."""

    def patch(**plugins):
        def make(blocked=()):
            host = PluginManager(discover=False)
            for name, plugin in plugins.items():
                host.register(plugin, name)
            return host

        mocker.patch("ezhoi_diffusion.ezhoi.attach.PluginHost", make)

    return patch


def run(host):
    with torch.no_grad():
        return [d for i, t in zip(host.images, host.targets, strict=True) for d in host.model([i], [t]) or []]


def test_nothing_enabled_attaches_nothing(host):
    before = run(host)
    attachment = attach(host.model, host.args)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules()) == 0
    after = run(host)
    attachment.detach()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)


def test_a_fork_that_forgot_the_flags_is_told(host):
    with pytest.raises(EzhoiDiffusionError, match="call add_arguments"):
        attach(host.model, Namespace(eval=True))


def test_a_plugin_that_only_contributes_is_not_enabled(host, use):
    use(gives=SimpleNamespace(register_bridges=hookimpl(lambda register: register("gives", lambda folder: None))))
    with pytest.raises(EzhoiDiffusionError, match="plugin 'gives' takes no part in a run"):
        attach(host.model, Namespace(**{**vars(host.args), "plugin": ["gives"]}))


def test_plugins_are_told_of_attach_and_detach_once(host, use):
    is_significant = []
    plugin = SimpleNamespace(
        on_attach=hookimpl(lambda host: is_significant.append(("attach", host.args.zs_type))),
        on_detach=hookimpl(lambda host: is_significant.append(("detach", host.failed))),
        post_adapter_feat=hookimpl(lambda adapter_feat, context: adapter_feat * 2),
    )
    use(doubles=plugin)
    host.args.plugin = ["doubles"]
    bare = run(host)
    with attach(host.model, host.args) as attachment:
        doubled = run(host)
    attachment.detach()
    assert is_significant == [("attach", "unseen_verb"), ("detach", False)]
    assert not all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, doubled, strict=True))
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, run(host), strict=True))


def test_detached_after_a_failure_too(host, use):
    is_significant = []
    use(
        p=SimpleNamespace(
            on_attach=hookimpl(lambda: 1 / 0), on_detach=hookimpl(lambda host: is_significant.append(host.failed))
        )
    )
    host.args.plugin = ["p"]
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        attach(host.model, host.args)
    assert is_significant == [True]


def test_an_injection_that_never_happened_is_an_error(host, use):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: None)))
    host.args.plugin = ["p"]
    with pytest.raises(FeatureTapError, match="never ran in eval mode"), attach(host.model, host.args):
        pass


def test_a_plugin_that_breaks_the_rules_ends_the_run_or_degrades_it(host, use, capsys):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat[:-1])))
    host.args.plugin = ["p"]
    with (
        pytest.raises(PluginError, match=r"plugin 'p'.*post_adapter_feat: returned shape"),
        attach(host.model, host.args),
    ):
        run(host)
    host.args.plugin_errors = "disable"
    bare = run(host)
    with attach(host.model, host.args):
        degraded = run(host)
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, degraded, strict=True))
    assert "DEGRADED: plugin 'p'" in capsys.readouterr().out


def test_a_fork_says_where_its_feature_is(host, use):
    host.model.pair_adapter = host.model.mem_adapter
    del host.model.mem_adapter
    type(host.model).mem_adapter = property(lambda self: self.pair_adapter)
    try:
        use(
            fork=SimpleNamespace(locate_adapter_feat=hookimpl(lambda model: ("pair_adapter", model.pair_adapter))),
            seen=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat + 1)),
        )
        host.args.plugin = ["fork", "seen"]
        with attach(host.model, host.args) as attachment:
            run(host)
        assert attachment.host.tap_point.name == "pair_adapter"
    finally:
        del type(host.model).mem_adapter


def test_capture_needs_the_host_s_data_sets(host, use):
    use(p=SimpleNamespace(on_train_batch=hookimpl(lambda batch: None)))
    host.args.plugin = ["p"]
    with pytest.raises(EzhoiDiffusionError, match=r"run main_tip_finetune\.py"):
        attach(host.model, host.args)


def test_only_the_first_bridge_may_restore_its_context(host):
    vectors = {name: vector.clone() for name, vector in context_vectors(host.model).items()}
    stored = fingerprint(host.model, host.args).to_dict()
    host.args.restore_context = True
    run = EzHoiRun(host.model, host.args, None, PluginManager(discover=False), find_feature_module(host.model))
    own = SimpleNamespace(provenance={"fingerprint": stored}, context=vectors)
    other = SimpleNamespace(
        provenance={"fingerprint": {**stored, "context": "other"}}, context={n: v + 1 for n, v in vectors.items()}
    )
    run.accept(own, "own")
    with pytest.raises(FingerprintError, match="context is"):
        run.accept(other, "other")
    assert all(torch.equal(v, vectors[n]) for n, v in context_vectors(host.model).items())


@pytest.mark.parametrize("provenance", [{}, {"fingerprint": ["x"]}, "text"])
def test_a_bridge_without_a_readable_fingerprint_is_refused(host, provenance):
    run = EzHoiRun(host.model, host.args, None, PluginManager(discover=False), find_feature_module(host.model))
    with pytest.raises(FingerprintError, match="was made for another host"):
        run.accept(SimpleNamespace(provenance=provenance), "odd")
    run.accept(lambda x: x, "knows nothing of hosts")


def test_a_bridge_that_fails_is_named(host, use):
    def load(folder):
        return lambda x: x / "0"

    use(
        breaks=SimpleNamespace(register_bridges=hookimpl(lambda register: register("breaks", lambda folder: 1 / 0))),
        late=SimpleNamespace(register_bridges=hookimpl(lambda register: register("late", load))),
    )
    from ezhoi_diffusion.ezhoi import attach as module

    plugins, device = module.PluginManager(), torch.device("cpu")
    run = EzHoiRun(host.model, host.args, None, plugins, find_feature_module(host.model))
    with pytest.raises(EzhoiDiffusionError, match="bridge 'breaks' could not be loaded: ZeroDivisionError"):
        resolve_variants("breaks", plugins, "", run.accept, device)
    inject = resolve_variants("late", plugins, "", run.accept, device)["late"].inject
    with pytest.raises(EzhoiDiffusionError, match="bridge 'late' raised TypeError"):
        inject(torch.ones(2, 2), None)


def test_mean_shift_needs_the_statistics_only(host, tmp_path):
    """A bridge whose network comes from a plugin that is not installed still has means."""
    from ezhoi_diffusion.builtin.mean_shift import load
    from ezhoi_diffusion.features.statistics import ModalityStatistics

    visual, text = torch.randn(50, 8) + 1, torch.randn(9, 8) - 1
    statistics = ModalityStatistics.of([visual], text)
    DiffusionBridge(BridgeConfig(8, RECIPES["gentle"], "echo"), Echo(), statistics).save_pretrained(tmp_path)
    shifted = load(tmp_path)(visual)
    assert torch.allclose(shifted.norm(dim=-1), visual.norm(dim=-1), atol=1e-5)
    after = ModalityStatistics.of([shifted], text)
    assert after.gap < 0.5 * statistics.gap


def test_the_host_s_own_meter_is_used_where_it_brings_one(mocker):
    """pocket's interface, as the host calls it."""
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
    assert _average_precision(scored, [3]).tolist() == [1]
    assert made == [(1, [3], 1, "11P")]
    assert _association()("gt", "detected", "scores").tolist() == [1]
    assert association.call_args.args == ("gt", "detected", "scores")


# -- fingerprint -----------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_weights_context_and_split(host, make_ezhoi):
    own = fingerprint(host.model, host.args)
    assert differences(own.to_dict(), fingerprint(host.model, host.args).to_dict()) == {}
    stored = {name: vector.clone() for name, vector in context_vectors(host.model).items()}
    assert stored
    with torch.no_grad():
        host.model.clip_head.prompt_learner.txtcls_ctx_pt[0][0, 0] += 1
    assert set(differences(own.to_dict(), fingerprint(host.model, host.args).to_dict())) == {"context"}
    restore_context(host.model, stored)
    assert differences(own.to_dict(), fingerprint(host.model, host.args).to_dict()) == {}
    with torch.no_grad():
        host.model.vis_fuse[0].bias[0] += 1e-6
    assert set(differences(own.to_dict(), fingerprint(host.model, host.args).to_dict())) == {"weights"}
    other = make_ezhoi(zs_type="rare_first")
    assert {"zs_type", "weights"} <= set(differences(own.to_dict(), fingerprint(other.model, other.args).to_dict()))
    with pytest.raises(ValueError, match="do not fit"):
        restore_context(host.model, {})
