"""The text cache: the encoder runs once, and no bit changes."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ezhoi_diffusion import attach, hookimpl
from ezhoi_diffusion.ezhoi import text_cache
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap
from ezhoi_diffusion.ezhoi.text_cache import MAX_MISSES, TextCache
from ezhoi_diffusion.plugins import PluginError
from helpers.miniature import ezhoi_flags, launch


class Encoder(nn.Module):
    """Has the parts of a text tower, and counts its runs in RUNS."""

    runs: list[tuple]

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.register_buffer("position", torch.randn(4))
        self.attn_mask = torch.randn(4)  # a plain attribute, as CLIP's
        self.loose = [torch.randn(4)]
        self.scale, self.activation = 1.0, torch.tanh

    def forward(self, prompts, tokens, contexts=(), **options):
        RUNS.append(prompts)
        x = self.activation(self.layer(prompts + self.position * self.attn_mask)) * self.scale + self.loose[0]
        for context in contexts or ():
            x = x + context
        return x[tokens], x.mT


RUNS: list = []


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    RUNS.clear()
    with torch.no_grad():
        yield Encoder().eval()


@pytest.fixture
def given():
    """Makes fresh tensors of the same values, as a prompt learner does."""

    def make():
        generator = torch.Generator().manual_seed(1)
        prompts, context = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
        return prompts, torch.tensor([2, 0]), [context, context * 2]

    return make


def same(a, b):
    return type(a) is type(b) and all(
        torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
    )


def plain(encoder, *args, **kwargs):
    """The encoder's result without a cache; not counted as a run."""
    runs = list(RUNS)
    result = type(encoder).forward(encoder, *args, **kwargs)
    RUNS[:] = runs
    return result


# -- the same while nothing changed ----------------------------------------------------------------------------


def test_encoder_runs_once_with_equal_bits_and_layout(encoder, given):
    expected = plain(encoder, *given())
    with TextCache(encoder):
        results = [encoder(*given()) for _ in range(5)]
    assert len(RUNS) == 1
    assert all(same(expected, result) for result in results)
    assert not results[-1][1].is_contiguous()


def test_writes_into_results_and_inputs_change_nothing_later(encoder, given):
    expected, inputs = plain(encoder, *given()), given()
    with TextCache(encoder):
        first = encoder(*inputs)
        second = encoder(*given())
        for tensor in (*first, *second, inputs[0], *inputs[2]):
            tensor.zero_()
        assert same(expected, encoder(*given()))
        assert same(plain(encoder, *inputs), encoder(*inputs)), "zeros now"
    assert len(RUNS) == 2


CHANGES = {
    "a parameter in place": lambda e: e.layer[0].weight.add_(1e-6),
    "load_state_dict": lambda e: e.load_state_dict({k: v + 1 for k, v in e.state_dict().items()}),
    "a parameter by another": lambda e: setattr(e.layer[0], "weight", nn.Parameter(e.layer[0].weight + 1)),
    "a parameter's data by other": lambda e: setattr(e.layer[0].weight, "data", e.layer[0].weight.data + 1),
    "a buffer": lambda e: e.position.mul_(2),
    "a buffer by another": lambda e: setattr(e, "position", e.position * 2),
    "a plain tensor": lambda e: e.attn_mask.mul_(2),
    "a plain tensor by another": lambda e: setattr(e, "attn_mask", e.attn_mask * 2),
    "a tensor in a list": lambda e: e.loose[0].mul_(2),
    "a list's tensor by another": lambda e: e.loose.__setitem__(0, e.loose[0] * 2),
    "a number": lambda e: setattr(e, "scale", 2.0),
    "a function": lambda e: setattr(e, "activation", torch.sin),
    "a module": lambda e: e.layer.__setitem__(0, nn.Linear(4, 4)),
    "one more module": lambda e: e.layer.append(nn.Linear(4, 4)),
    "double precision": lambda e: e.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_noticed(encoder, given, change):
    def inputs():
        prompts, tokens, contexts = given()
        dtype = encoder.layer[0].weight.dtype
        return prompts.to(dtype), tokens, [context.to(dtype) for context in contexts]

    with TextCache(encoder):
        before = [encoder(*inputs()) for _ in range(2)][-1]
        change(encoder)
        after = [encoder(*inputs()) for _ in range(2)]
        expected = plain(encoder, *inputs())
        assert not same(before, expected)
        assert all(same(expected, result) for result in after)
    assert len(RUNS) == 2


def test_optimizer_step_is_noticed(encoder, given):
    optimizers = [
        torch.optim.SGD(encoder.parameters(), 0.1),
        torch.optim.AdamW(encoder.parameters(), 0.1, foreach=True),
    ]
    with TextCache(encoder):
        for optimizer in optimizers:
            encoder(*given())
            for parameter in encoder.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            assert same(plain(encoder, *given()), encoder(*given()))
    assert len(RUNS) == 3


def test_addresses_of_weights_are_not_reused():
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)  # large enough for the allocator to give the same block again
    with torch.no_grad(), TextCache(layer.eval()):
        for _ in range(20):
            layer(x)
            layer.weight.data = torch.empty(0)  # as an offloader does
            layer.weight.data = torch.randn(512, 512)
            assert torch.equal(plain(layer, x), layer(x))
            layer.weight.add_(0)  # another version, so that the cache does not give up


def other_prompts(prompts, tokens, contexts):
    return prompts + 1e-6, tokens, contexts


INPUTS = {
    "prompts": other_prompts,
    "tokens": lambda p, t, c: (p, t.flip(0), c),
    "a context": lambda p, t, c: (p, t, [c[0], c[1] + 1]),
    "fewer contexts": lambda p, t, c: (p, t, c[:1]),
    "none": lambda p, t, c: (p, t, None),
    "a tuple": lambda p, t, c: (p, t, tuple(c)),
    "fewer prompts": lambda p, t, c: (p[:, :], t[:1], c),
    "memory order": lambda p, t, c: (p.mT.contiguous().mT, t, c),
    "half": lambda p, t, c: (p.double().half().float(), t, c),
    "a zero's sign": lambda p, t, c: (torch.where(p > 0, -0.0, 0.0), t, c),
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
def test_changed_inputs_are_noticed(encoder, given, change):
    def start():
        prompts, tokens, contexts = given()
        return (torch.zeros_like(prompts) if change is INPUTS["a zero's sign"] else prompts), tokens, contexts

    with TextCache(encoder):
        encoder(*start())
        results = [encoder(*change(*given())) for _ in range(2)]
        assert all(same(plain(encoder, *change(*given())), result) for result in results)
    assert len(RUNS) == 2


def test_keyword_arguments_count(encoder, given):
    prompts, tokens, contexts = given()
    with TextCache(encoder):
        encoder(prompts, tokens, contexts=contexts, mode="a")
        encoder(prompts, tokens, contexts=contexts, mode="a")
        assert len(RUNS) == 1
        encoder(prompts, tokens, contexts=contexts, mode="b")
        encoder(prompts, tokens=tokens, contexts=contexts, mode="b")
        encoder(prompts, tokens=tokens, contexts=contexts, kind="b")
    assert len(RUNS) == 4


def test_nan_equals_itself(encoder, given):
    with TextCache(encoder):
        for _ in range(3):
            prompts, *rest = given()
            encoder(prompts.fill_(torch.nan), *rest)
    assert len(RUNS) == 1


def test_cache_switches_off_if_inputs_keep_changing(encoder, given, mocker, caplog):
    caplog.set_level(logging.INFO)
    compared, copied = mocker.spy(text_cache, "_same_values"), mocker.spy(copy, "deepcopy")
    with TextCache(encoder) as cache:
        for i in range(10):
            prompts, *rest = given()
            assert same(plain(encoder, prompts + i, *rest), encoder(prompts + i, *rest))
            if i == MAX_MISSES - 1:
                before = compared.call_count, copied.call_count
        assert (compared.call_count, copied.call_count) == before
        assert cache._entry is None
    assert len(RUNS) == 10
    assert [r.message for r in caplog.records] == [
        "text_cache: the text encoder runs for every image, as in a bare run: what it depends on changes from image to image"
    ]


def test_occasional_changes_do_not_switch_the_cache_off(encoder, given):
    with TextCache(encoder):
        for i in range(10):
            prompts, *rest = given()
            for _ in range(2):
                encoder(prompts + i, *rest)
    assert len(RUNS) == 10


# -- when it does nothing ----------------------------------------------------------------------------------------


def test_training_and_gradients_clear_the_cache(encoder, given):
    with TextCache(encoder) as cache:
        encoder(*given())
        with torch.enable_grad():
            assert encoder(*given())[0].requires_grad
        assert cache._entry is None
        encoder(*given())
        encoder.train()
        assert not same(encoder(*given()), encoder(*given())), "dropout is at work"
        encoder.layer[1] = nn.Identity()
        for _ in range(2):
            encoder(*given())
        encoder.eval()
        encoder(*given())
    assert len(RUNS) == 8


def test_dropout_in_eval_mode_draws_every_time(encoder, given):
    encoder.layer[1].train()
    torch.manual_seed(3)
    expected = [plain(encoder, *given()) for _ in range(5)]
    torch.manual_seed(3)
    with TextCache(encoder):
        assert all(same(result, encoder(*given())) for result in expected)


def test_torch_settings_are_part_of_the_state(encoder, given):
    with TextCache(encoder):
        plain_result = encoder(*given())
        with torch.autocast("cpu", torch.bfloat16):
            encoder(*given())
            assert same(plain(encoder, *given()), encoder(*given()))
            assert len(RUNS) == 2
        with torch.inference_mode():
            encoder(*given())
            assert encoder(*given())[0].is_inference()
            assert len(RUNS) == 3
        result = encoder(*given())
        assert same(result, plain_result)
        assert not result[0].is_inference()


def test_inner_hooks_and_forwards_are_called_every_time(encoder, given):
    seen = []
    with TextCache(encoder):
        encoder(*given())
        handle = encoder.layer[0].register_forward_hook(lambda *call: seen.append(call))
        for _ in range(5):
            encoder(*given())
        assert len(seen) == 5
        handle.remove()
        own, encoder.layer[0].forward = encoder.layer[0].forward, lambda x: seen.append(x) or own(x) + 1
        for _ in range(5):
            assert same(plain(encoder, *given()), encoder(*given()))
        assert len(seen) == 15
        del encoder.layer[0].forward
        encoder(*given())
        encoder(*given())
    assert len(RUNS) == 12


def test_global_hooks_are_called_every_time(encoder, given):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *call: seen.append(type(module)))
    try:
        with TextCache(encoder):
            for _ in range(2):
                encoder(*given())
    finally:
        handle.remove()
    assert seen == [nn.Linear, nn.Dropout, nn.Sequential, Encoder] * 2


def test_hooks_of_the_encoder_are_called_every_time(encoder, given):
    seen = []
    encoder.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    encoder.register_forward_hook(lambda module, args, output: seen.append(output) or (output[0] * 2, output[1]))
    prompts, *rest = given()
    expected = plain(encoder, prompts + 1, *rest)
    with TextCache(encoder):
        results = [encoder(*given()) for _ in range(4)]
    assert len(seen) == 4
    assert len(RUNS) == 1
    assert all(same((expected[0] * 2, expected[1]), result) for result in results)


class Odd(Encoder):
    def __init__(self, behaviour):
        super().__init__()
        self.behaviour, self.calls = behaviour, 0

    def forward(self, prompts, tokens, contexts=(), **options):
        result = super().forward(prompts, tokens, contexts)
        return self.behaviour(self, prompts, result)


def _counts(self, prompts, result):
    self.calls += 1
    return result[0] + self.calls, result[1]


ODD = {
    "writes into an input": lambda self, prompts, result: (prompts.add_(1).clone(), result[1]),
    "writes into itself": lambda self, prompts, result: (self.position.add_(1).clone(), result[1]),
    "counts": _counts,
    "returns an input": lambda self, prompts, result: (prompts[1:], result[1]),
    "returns a weight": lambda self, prompts, result: (self.layer[0].weight[:2], result[1]),
    "draws": lambda self, prompts, result: (result[0] + torch.rand(()), result[1]),
    "returns something else": lambda self, prompts, result: (result[0], io.StringIO("x")),
    "is sparse": lambda self, prompts, result: (result[0], result[1].to_sparse()),
    "gives gradients": lambda self, prompts, result: (result[0], torch.enable_grad()(self.layer[0])(result[0])),
}


@pytest.mark.parametrize("behaviour", ODD.values(), ids=ODD)
def test_encoder_with_side_effects_runs_every_time(given, behaviour):
    RUNS.clear()
    with torch.no_grad(), TextCache(Odd(behaviour).eval()) as cache:
        for _ in range(5):
            prompts, *rest = given()
            cache.module.calls = 0
            first, _ = cache.module(prompts, *rest)
            if behaviour is ODD["returns an input"]:
                first.zero_()
                assert not prompts[1:].any()
    assert len(RUNS) == 5


def test_encoder_runs_for_inputs_that_cannot_be_compared(encoder, given):
    prompts, tokens, _ = given()
    with TextCache(encoder):
        for _ in range(5):
            encoder(prompts, tokens, something=object())
            encoder(prompts, tokens, something=torch.ones(2).to_sparse())
    assert len(RUNS) == 10


def test_errors_of_the_encoder_pass_through(encoder, given):
    prompts, tokens, contexts = given()
    with TextCache(encoder):
        encoder(prompts, tokens, contexts)
        for _ in range(2):
            with pytest.raises(IndexError):
                encoder(prompts, tokens + 9, contexts)
        assert same(plain(encoder, *given()), encoder(*given()))
    assert len(RUNS) == 4


def test_lack_of_memory_for_a_copy_is_no_error(encoder, given, mocker):
    with TextCache(encoder):
        mocker.patch.object(text_cache.copy, "deepcopy", side_effect=torch.OutOfMemoryError("full"))
        for _ in range(3):
            assert same(plain(encoder, *given()), encoder(*given()))


# -- coming and going ----------------------------------------------------------------------------------------------


def test_module_and_state_dict_are_unchanged(encoder, given):
    before, names = dict(vars(encoder)), list(encoder.state_dict())
    cache = TextCache(encoder).attach()
    encoder(*given())
    assert list(encoder.state_dict()) == names
    assert len(list(encoder.modules())) == 4
    cache.remove()
    cache.remove()
    assert vars(encoder) == before
    assert cache._entry is None


def test_two_caches_can_be_removed_in_any_order(encoder, given):
    for last in (0, 1):
        RUNS.clear()
        caches = [TextCache(encoder).attach(), TextCache(encoder).attach()]
        for _ in range(3):
            encoder(*given())
        assert len(RUNS) == 1
        caches[1 - last].remove()
        assert same(plain(encoder, *given()), encoder(*given()))
        caches[last].remove()
        assert "forward" not in vars(encoder)


def test_module_with_own_forward_is_left_alone(encoder, given):
    encoder.forward = own = lambda *args: type(encoder).forward(encoder, *args)[0] + len(RUNS)
    with TextCache(encoder):
        assert encoder.forward is own
        assert not torch.equal(encoder(*given()), encoder(*given()))
    assert vars(encoder)["forward"] is own


def test_wrapper_stays_and_reaches_the_encoder(encoder, given):
    cache = TextCache(encoder).attach()
    inner = encoder.forward
    encoder.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    encoder(*given())
    cache.remove()
    for _ in range(2):
        assert same(plain(encoder, *given()), encoder(*given()))
    assert len(RUNS) == 3
    assert "forward" in vars(encoder)


def test_copied_module_uses_its_own_weights(encoder, given):
    with TextCache(encoder):
        encoder(*given())
        copied = copy.deepcopy(encoder)
        copied.layer[0].weight.add_(1)
        for _ in range(2):
            result = copied(*given())
            assert same(plain(copied, *given()), result)
            assert not same(plain(encoder, *given()), result)
        assert len(RUNS) == 3
        encoder(*given())
        assert len(RUNS) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["script", "trace", "compile"])
def test_scripted_traced_and_compiled_modules_are_left_alone(how):
    module = nn.Linear(2, 2).eval()
    made = {
        "script": lambda: torch.jit.script(module),
        "trace": lambda: torch.jit.trace(module, torch.ones(1, 2)),
        "compile": lambda: torch.compile(module, backend="eager"),
    }[how]()
    before = dict(vars(made))
    with torch.no_grad(), TextCache(made):
        assert vars(made) == before
        assert torch.equal(made(torch.ones(1, 2)), module(torch.ones(1, 2)))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracing_records_no_constant(encoder, given):
    prompts, *_ = given()
    layer = encoder.layer.eval()
    with TextCache(layer):
        layer(prompts)
        traced = torch.jit.trace(layer, prompts)
        assert torch.equal(traced(prompts + 1), layer(prompts + 1))


# -- in EZ-HOI -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(ezhoi, mocker):
    """The calls of the real encoder."""
    return mocker.spy(type(ezhoi.model.clip_head.text_encoder), "forward")


def scored(ezhoi, mocker, batch=1):
    """Detections and logits of all images."""
    spy = mocker.spy(type(ezhoi.model), "postprocessing")
    detections = []
    with torch.no_grad():
        for i in range(0, len(ezhoi.images), batch):
            detections += ezhoi.model(ezhoi.images[i : i + batch], ezhoi.targets[i : i + batch]) or []
    logits = [logit for call in spy.call_args_list for logit in call.args[4]]
    mocker.stop(spy)
    assert len(logits) > 5
    return [tensor for one in detections for tensor in one.values()] + logits


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("flags", [(), ("--txt_align", "--act_descriptor")], ids=["", "more text modules"])
@pytest.mark.parametrize("batch", [1, 4])
def test_detections_and_logits_equal_a_bare_run(make_ezhoi, mocker, batch, flags):
    ezhoi = make_ezhoi(*flags)
    bare, state = scored(ezhoi, mocker, batch), list(ezhoi.model.state_dict())
    runs = mocker.spy(type(ezhoi.model.clip_head.text_encoder), "forward")
    modules = [id(m) for m in ezhoi.model.modules()]
    with attach(ezhoi.model, ezhoi.args):
        cached = scored(ezhoi, mocker, batch)
        assert runs.call_count == 1
        assert list(ezhoi.model.state_dict()) == state
        assert [id(m) for m in ezhoi.model.modules()] == modules
    assert equal(bare, cached)
    assert "forward" not in vars(ezhoi.model.clip_head.text_encoder)
    assert equal(bare, scored(ezhoi, mocker, batch))


def test_replaced_and_captured_features_equal_those_without_cache(ezhoi, mocker, runs, use):
    double = SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat * 2))
    use(double=double)
    ezhoi.args.plugin = ["double"]
    found, rows = {}, {}
    for blocked in (["text_cache"], []):
        ezhoi.args.no_plugin = blocked
        before = runs.call_count
        with attach(ezhoi.model, ezhoi.args):
            found[bool(blocked)] = scored(ezhoi, mocker)
        assert runs.call_count - before == (len(ezhoi.images) if blocked else 1)
    assert equal(found[True], found[False])
    for cached in (False, True):
        events = rows.setdefault(cached, [])
        tap = FeatureTap(ezhoi.model, observe=lambda pairs, x, text, logits, e=events: e.extend([x, text, logits]))
        with tap, TextCache(ezhoi.model.clip_head.text_encoder) if cached else tap:
            scored(ezhoi, mocker)
    assert len(rows[True]) == 3 * len(ezhoi.images)
    assert equal([t for t in rows[True] if t is not None], [t for t in rows[False] if t is not None])


def test_capture_pass_encodes_once_and_writes_the_same(ezhoi, use, runs, mocker, ezhoi_modules):
    batches = []
    use(rows=SimpleNamespace(on_train_batch=hookimpl(lambda batch: batches.append(batch))))
    collate = ezhoi_modules.utils.custom_collate
    loader = SimpleNamespace(dataset=ezhoi.dataset, collate_fn=collate)
    engine = SimpleNamespace(_train_loader=loader)
    ezhoi.args.plugin, ezhoi.args.max_images = ["rows"], 6
    found = {}
    for blocked in (["text_cache"], []):
        ezhoi.args.no_plugin = blocked
        batches.clear()
        before = runs.call_count
        with pytest.raises(SystemExit):
            attach(ezhoi.model, ezhoi.args, engine)
        assert runs.call_count - before == (6 if blocked else 1)
        found[bool(blocked)] = [t for b in batches for t in (b.adapter_feat, b.logits, b.labels)]
    assert equal(found[True], found[False])
    assert "forward" not in vars(ezhoi.model.clip_head.text_encoder)


@pytest.mark.parametrize("part", ["adapter_feat", "logits", "gt_boxes", "pairs.boxes"])
def test_a_plugin_that_writes_into_a_captured_image_ends_the_pass(ezhoi, use, ezhoi_modules, part):
    def write(batch):
        for name in part.split("."):
            batch = getattr(batch, name)
        batch.add_(1)

    seen = []
    use(
        writes=SimpleNamespace(on_train_batch=hookimpl(write)),
        reads=SimpleNamespace(on_train_batch=hookimpl(lambda batch: seen.append(batch))),
    )
    loader = SimpleNamespace(dataset=ezhoi.dataset, collate_fn=ezhoi_modules.utils.custom_collate)
    ezhoi.args.plugin, ezhoi.args.max_images = ["writes", "reads"], 6
    with pytest.raises(PluginError, match=rf"plugin 'writes'.*on_train_batch: it writes into batch\.{part}"):
        attach(ezhoi.model, ezhoi.args, SimpleNamespace(_train_loader=loader))
    assert not seen


def test_changed_context_vectors_are_noticed(ezhoi, mocker, runs):
    vectors = ezhoi.model.clip_head.prompt_learner.txtcls_ctx_pt
    with attach(ezhoi.model, ezhoi.args), torch.no_grad():
        first = scored(ezhoi, mocker)
        vectors[0].add_(1)
        changed = scored(ezhoi, mocker)
    assert runs.call_count == 2
    assert not equal(first, changed)
    assert equal(changed, scored(ezhoi, mocker))


def test_training_equals_a_bare_run(ezhoi):
    def losses():
        torch.manual_seed(5)
        ezhoi.model.train()
        result = ezhoi.model(ezhoi.images[:4], ezhoi.targets[:4])
        return [result["interaction_loss"], result["sem_loss"]]

    bare = losses()
    with attach(ezhoi.model, ezhoi.args):
        assert equal(bare, losses())
        ezhoi.model.zero_grad()
        losses()[1].backward()
        assert ezhoi.model.clip_head.text_encoder.text_projection.grad is not None


def test_encoder_is_untouched_if_blocked_absent_or_training(ezhoi, mocker, use):
    encoder, engine = ezhoi.model.clip_head.text_encoder, SimpleNamespace(test_hico=None)
    with attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "no_plugin": ["text_cache"]})):
        assert "forward" not in vars(encoder)
    with attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "eval": False}), engine) as attachment:
        assert "forward" not in vars(encoder)
        assert attachment.run.plugins.enabled == []
    with attach(ezhoi.model, ezhoi.args, engine):
        assert "forward" in vars(encoder)
    del ezhoi.model.clip_head
    with attach(ezhoi.model, ezhoi.args, engine):
        pass


def test_no_hook_point_is_needed(ezhoi, mocker):
    del ezhoi.model.mem_adapter, ezhoi.model.vis_fuse
    for named in ([], ["text_cache"]):
        with attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "plugin": named})):
            assert "forward" in vars(ezhoi.model.clip_head.text_encoder)
    assert "forward" not in vars(ezhoi.model.clip_head.text_encoder)


def test_cache_ends_with_the_evaluation(ezhoi, runs):
    class Engine:
        def test_hico(self):
            with torch.no_grad():
                for image, target in zip(ezhoi.images[:3], ezhoi.targets[:3], strict=True):
                    ezhoi.model([image], [target])
            return "mAP"

    engine = Engine()
    attach(ezhoi.model, ezhoi.args, engine)
    assert engine.test_hico() == "mAP"
    assert runs.call_count == 1
    assert "forward" not in vars(ezhoi.model.clip_head.text_encoder)
    assert vars(engine) == {}


def test_two_detectors_at_once(ezhoi, make_ezhoi, mocker):
    other = make_ezhoi(zs_type="rare_first")
    bare = scored(other, mocker)
    first, second = attach(ezhoi.model, ezhoi.args), attach(other.model, other.args)
    first.detach()
    assert equal(bare, scored(other, mocker))
    assert "forward" in vars(other.model.clip_head.text_encoder)
    second.detach()
    assert "forward" not in vars(other.model.clip_head.text_encoder)


def test_default_plugins_come_after_named_ones(ezhoi, use):
    named = SimpleNamespace(on_attach=hookimpl(lambda run: None))
    use(named=named)
    with attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "plugin": ["named"]})) as attachment:
        assert attachment.run.plugins.enabled == ["named", "text_cache"]


def test_named_and_blocked_is_an_error(ezhoi):
    with pytest.raises(PluginError, match="blocked"):
        attach(ezhoi.model, Namespace(**{**vars(ezhoi.args), "plugin": ["text_cache"], "no_plugin": ["text_cache"]}))


COUNTING = """
import os
from ezhoi_diffusion.demo import towers
encode = towers.TextEncoder.forward
def forward(self, *args):
    with open(os.environ["ENCODER_RUNS"], "a") as file:
        file.write("x")
    return encode(self, *args)
towers.TextEncoder.forward = forward
"""


@pytest.mark.parametrize(
    ("flags", "runs"),
    [((), 1), (("--no-plugin", "text_cache"), None), (("--world-size", "2"), 2)],
    ids=["", "blocked", "two processes"],
)
def test_launched_evaluation_encodes_once_per_process(small_world, tmp_path, flags, runs):
    (tmp_path / "sitecustomize.py").write_text(COUNTING)  # processes that EZ-HOI spawns import it, too
    count = tmp_path / "runs"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = launch(*ezhoi_flags(small_world, evaluate=True), *flags, PYTHONPATH=path, ENCODER_RUNS=str(count))
    assert done.returncode == 0, done.stderr
    assert "The mAP is" in done.stdout
    encoded = len(count.read_text())
    assert encoded == runs if runs else encoded > 20
