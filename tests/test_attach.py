"""attach(), as a fork's script calls it, and the bridge inside the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ezhoi_diffusion import EzhoiDiffusionError, attach, hookimpl
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.host.fingerprint import context_vectors, fingerprint, restore_context
from ezhoi_diffusion.host.taps import Tap, TapError
from ezhoi_diffusion.plugins import PluginError, PluginHost


class Echo(nn.Module):
    """The identity denoiser."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return x


@pytest.fixture
def host(make_host):
    return make_host()


def logits_of(host, mocker, inject):
    spy = mocker.spy(type(host.model), "postprocessing")
    with torch.no_grad(), Tap(host.model, inject=inject):
        for image, target in zip(host.images, host.targets, strict=True):
            host.model([image], [target])
    found = [x for call in spy.call_args_list for x in call.args[4]]
    mocker.stop(spy)
    return found


@pytest.mark.parametrize("recipe", ["blend", "paper"])
def test_with_an_identity_denoiser_the_host_s_logits_do_not_move(host, mocker, recipe):
    seen = []
    with torch.no_grad(), Tap(host.model, observe=lambda pairs, x, text: seen.append((x, text))):
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
            host = PluginHost(discover=False)
            for name, plugin in plugins.items():
                host.register(plugin, name)
            return host

        mocker.patch("ezhoi_diffusion.host.attach.PluginHost", make)

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


def test_plugins_are_told_of_attach_and_detach_once(host, use):
    told = []
    plugin = SimpleNamespace(
        on_attach=hookimpl(lambda host: told.append(("attach", host.args.zs_type))),
        on_detach=hookimpl(lambda host: told.append(("detach", host.failed))),
        post_adapter_feat=hookimpl(lambda adapter_feat, context: adapter_feat * 2),
    )
    use(doubles=plugin)
    host.args.plugin = ["doubles"]
    bare = run(host)
    with attach(host.model, host.args) as attachment:
        doubled = run(host)
    attachment.detach()
    assert told == [("attach", "unseen_verb"), ("detach", False)]
    assert not all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, doubled, strict=True))
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(bare, run(host), strict=True))


def test_detached_after_a_failure_too(host, use):
    told = []
    use(p=SimpleNamespace(on_attach=hookimpl(lambda: 1 / 0), on_detach=hookimpl(lambda host: told.append(host.failed))))
    host.args.plugin = ["p"]
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        attach(host.model, host.args)
    assert told == [True]


def test_an_injection_that_never_happened_is_an_error(host, use):
    use(p=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: None)))
    host.args.plugin = ["p"]
    with pytest.raises(TapError, match="never ran in eval mode"), attach(host.model, host.args):
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


# -- fingerprint -----------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_weights_context_and_split(host, make_host):
    own = fingerprint(host.model, host.args)
    assert own.differences(fingerprint(host.model, host.args).to_dict()) == {}
    stored = {name: vector.clone() for name, vector in context_vectors(host.model).items()}
    assert stored
    with torch.no_grad():
        host.model.clip_head.prompt_learner.txtcls_ctx_pt[0][0, 0] += 1
    assert set(own.differences(fingerprint(host.model, host.args).to_dict())) == {"context"}
    restore_context(host.model, stored)
    assert own.differences(fingerprint(host.model, host.args).to_dict()) == {}
    with torch.no_grad():
        host.model.vis_fuse[0].bias[0] += 1e-6
    assert set(own.differences(fingerprint(host.model, host.args).to_dict())) == {"weights"}
    other = make_host(zs_type="rare_first")
    assert {"zs_type", "weights"} <= set(own.differences(fingerprint(other.model, other.args).to_dict()))
    with pytest.raises(ValueError, match="do not fit"):
        restore_context(host.model, {})
