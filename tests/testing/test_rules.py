"""The test kit for authors of bridges: synthetic captures, and rules that notice each fault."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge, BridgeError, as_bridge
from ezhoi_diffusion.builtin import diffusion, identity, mean_shift
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.evaluation.average_precision import matches
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.labels import seen_pairs
from ezhoi_diffusion.features.score import EzHoiScore, require_replayable
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.scoring.bridge import SCORE, ScoreBridge
from ezhoi_diffusion.testing import (
    BRIDGE_RULES,
    FIT_RULES,
    ConformanceError,
    Truth,
    check_bridge,
    check_fit,
    hicodet_shape,
    hicodet_store,
    synthetic_store,
)
from ezhoi_diffusion.testing.synthetic import INTERACTIONS

# -- made-up captures --------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_store_and_splits_are_of_one_run(tmp_path):
    a, b = (synthetic_store(tmp_path / name) for name in "ab")
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()
    test = synthetic_store(tmp_path / "test", split="test")
    assert test.fingerprint == a.fingerprint
    assert all(torch.equal(test.ezhoi[name], tensor) for name, tensor in a.ezhoi.items())
    assert (test.split, len(test)) == ("test", len(a))
    assert not torch.equal(test.adapter_feat(), b.adapter_feat())
    other = synthetic_store(tmp_path / "other", seed=1)
    assert other.fingerprint["weights"] != a.fingerprint["weights"]
    with pytest.raises(FeatureStoreError, match="holds a finished capture"):
        synthetic_store(tmp_path / "a")


def test_it_is_a_capture_like_any_other(tmp_path):
    store = synthetic_store(tmp_path / "f", images=16, pairs_per_image=5, dim=20)
    assert (len(store.images), len(store), store.adapter_feat().shape[1]) == (16, 14 * 5, 20)
    assert [i for i, image in enumerate(store.images) if not image["rows"]] == [7, 15]
    assert len(store.index["shards"]) > 1
    assert require_replayable(store, EzHoiScore.from_store(store)) < 1e-5
    assert set(store.context) == {"ctx.0"}
    groups = {
        name.removeprefix("classes/"): set(index.tolist())
        for name, index in store.ezhoi.items()
        if name.startswith("classes/")
    }
    assert groups["seen"] | groups["unseen"] == groups["rare"] | groups["non-rare"] == groups["full"] == set(range(24))
    assert not groups["seen"] & groups["unseen"]
    assert len(store.meta["interactions"]) == 24
    everything = synthetic_store(tmp_path / "g", images=16, unseen=False)
    assert "classes/unseen" not in everything.ezhoi
    assert everything.fingerprint["zs_type"] is None


def test_labels_are_annotations_that_were_found(tmp_path):
    checked = []

    def check(batch):
        table = torch.tensor([v for _, v in INTERACTIONS])
        humans, others = batch.pairs.boxes[batch.pairs.pairing]
        expected = torch.zeros_like(batch.labels)
        for annotation, hoi in enumerate(batch.gt_hoi.tolist()):
            gt = batch.gt_boxes[:, annotation : annotation + 1]
            expected[matches((gt[0], gt[1]), (humans, others))[1], table[hoi]] = True
        checked.append((expected.sum(), len(batch.gt_hoi)))
        assert torch.equal(batch.labels, expected)
        return batch

    synthetic_store(tmp_path / "f", images=60, alter=check)
    labelled, annotated = (sum(column) for column in zip(*checked, strict=True))
    assert 0 < annotated - labelled < 0.2 * annotated


@pytest.mark.parametrize("dim", [4, 32, 512])
def test_the_truth_is_recovered_from_the_features(tmp_path, dim):
    store, truth = synthetic_store(tmp_path / "f", images=40, dim=dim), Truth.from_seed(dim=dim)
    assert torch.allclose(truth.map @ truth.map.T, torch.eye(dim), atol=1e-5)
    assert torch.allclose(truth.text_of(truth.visual_of(truth.text)), normalize(truth.text), atol=1e-5)
    pairs = seen_pairs(store)
    wanted = normalize(pairs.text) - truth.text_mean
    centred = normalize(pairs.visual) * truth.offset.norm() - truth.offset
    before, after = ((normalize(x) * normalize(wanted)).sum(1).mean() for x in (centred, centred @ truth.map))
    assert after > before + 0.2


def test_seen_pairs_are_seen_and_an_altered_store_is_altered(tmp_path):
    store = synthetic_store(tmp_path / "f", images=60)
    assert {8, 9}.isdisjoint(seen_pairs(store, held_out=None).target.tolist())  # the two verbs that are hidden
    doubled = synthetic_store(
        tmp_path / "g", images=60, alter=lambda batch: replace(batch, adapter_feat=2 * batch.adapter_feat)
    )
    assert torch.equal(doubled.adapter_feat(), 2 * store.adapter_feat())
    assert torch.equal(FeatureStore(tmp_path / "g").rows("labels"), store.rows("labels"))


def test_ezhoi_is_right_sometimes_and_the_truth_more_often(tmp_path):
    from ezhoi_diffusion.evaluation.replay import replay

    store, truth = synthetic_store(tmp_path / "f", split="test", images=60), Truth.from_seed()
    known = Variant("truth", as_bridge(lambda x: x.norm(dim=1, keepdim=True) * normalize(truth.text_of(normalize(x)))))
    comparison = replay(store, {"truth": known})
    assert 20 < comparison.mean_ap("none", "full") < 60
    assert comparison.difference("truth", "full") > 4


def test_a_store_in_hicodets_shape_has_its_classes_and_is_as_hard_as_it(tmp_path):
    from ezhoi_diffusion.evaluation.replay import replay

    store = hicodet_store(tmp_path / "f", split="test", images=60)
    score = EzHoiScore.from_store(store)
    assert (score.label.shape, score.object_to_target.shape, store.text.shape) == ((600, 117), (80, 117), (600, 512))
    assert [len(store.ezhoi[f"classes/{name}"]) for name in ("full", "unseen", "rare")] == [600, 120, 138]
    assert score.inverse.shape == (512, 117), "so bridges on scores can be used"
    pairs = sorted(image["rows"] for image in store.images if image["rows"])
    assert pairs[0] == 15
    assert pairs[-1] > 50
    assert 24 < sum(pairs) / len(pairs) < 30
    assert 0.08 < store.rows("labels").any(1).float().mean() < 0.15
    assert 10 < replay(store, {}).mean_ap("none", "full") < 40


def test_the_shape_of_a_store_can_be_chosen_and_the_seed_decides_the_rest(tmp_path):
    shape = hicodet_shape(objects=6, verbs=8, interactions=20)
    one, same, other = (
        hicodet_store(tmp_path / name, images=20, dim=40, seed=seed, shape=shape)
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert one.text.shape == (20, 40)
    assert one.index == same.index
    assert one.fingerprint["weights"] != other.fingerprint["weights"]
    with pytest.raises(ValueError, match="cannot have 50 interactions"):
        hicodet_shape(objects=6, verbs=8, interactions=50)


# -- rules for bridges -------------------------------------------------------------------------------------------

D = 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A diffusion bridge whose weights are not those of its start, where it returns its input."""
    folder = tmp_path_factory.mktemp("trained")
    store = synthetic_store(folder / "features", dim=D)
    config = BridgeConfig(D, RECIPES["paper"], "mlp", {"width": 32})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(config)
        for weight in denoiser.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    DiffusionBridge(config, denoiser, store.statistics()).save_pretrained(folder / "bridge")
    return folder / "bridge"


@pytest.mark.parametrize("name", ["identity", "mean_shift", "diffusion"])
def test_the_built_in_bridges_keep_the_rules(trained, name):
    load = {"identity": identity, "mean_shift": mean_shift, "diffusion": diffusion}[name].load
    rows = torch.randn(3, D)
    assert torch.equal(load(trained)(rows), rows) == (name == "identity")
    check_bridge(load, trained, dim=D)


class Applies(Bridge):
    """A bridge of one function, with attributes."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, adapter_feat, pairs=None):
        return self.function(adapter_feat)


class Refuses(Applies):
    """A bridge with an `override` of its own."""

    def __init__(self, override):
        super().__init__(lambda x: x)
        self._override = override

    def override(self, **settings):
        return self._override(self, settings)


class UsesPairs(Bridge):
    """A bridge that uses the detector's scores, and says so or not."""

    def __init__(self, needs_pairs):
        super().__init__()
        self.needs_pairs = needs_pairs

    def forward(self, adapter_feat, pairs=None):
        if pairs is None:
            return adapter_feat
        return adapter_feat * pairs.scores[pairs.pairing[1]].unsqueeze(1).to(adapter_feat.dtype)


def applies(function, **attributes):
    return lambda folder: Applies(function, **attributes)


def loads(make):
    """A bridge with something of its own: make() -> function."""
    return lambda folder: Applies(make())


def buffered():
    buffers = {}

    def call(x):
        buffer = buffers.setdefault((x.shape, x.dtype), torch.empty_like(x))
        return buffer.copy_(x)

    return call


def remembers():
    last = SimpleNamespace(length=0)

    def call(x):
        result = x + 1e-6 * last.length
        last.length = len(x)
        return result

    return call


def noise_of_the_seed(x):
    with torch.random.fork_rng():
        return x + 1e-6 * torch.rand(len(x), 1, dtype=torch.float32).to(x.dtype)


def doing(action):
    """A bridge that returns its rows, and does something else as well."""

    def call(x):
        action()
        return x

    return applies(call)


def first_row_counts_twice(x):
    return torch.cat([2 * x[:1], x[1:]])


def random_weight():
    weight = torch.rand(D)
    return lambda x: x * weight.to(x.dtype)


class MovesTwice(ScoreBridge):
    """Returns features with other logits than it says."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        tables = {"text": torch.randn(4, D, generator=draw), "label": torch.eye(4), "sample_lens": torch.ones(4)}
        tables |= {name: torch.tensor(1.0) for name in ("logit_scale", "hyper_lambda")}
        super().__init__(Artifact("twice", files={SCORE: {**tables, "object_to_target": torch.ones(3, 4).bool()}}))
        self.provenance = None

    def moved_logits(self, x, logits, pairs):
        return 2 * logits

    def forward(self, adapter_feat, pairs=None):
        moved = super().forward(adapter_feat, pairs)
        return moved + (moved - adapter_feat)


PARAMETER = torch.nn.Parameter(torch.ones(D))
BROKEN = [
    ("shape", applies(lambda x: x[:, 1:]), "[5, 15] was returned for [5, 16]"),
    ("shape", applies(lambda x: x.tolist()), "a list was returned"),
    ("shape", applies(lambda x: x[None] if len(x) > 1 else x), "[1, 5, 16] was returned"),
    ("shape", applies(lambda x: x.squeeze(0)), "[16] was returned for [1, 16]"),
    ("device", applies(lambda x: x.to("meta")), "it is on meta"),
    ("dtype", applies(lambda x: x.float()), "torch.float32 was returned for torch.float64, torch.float32 was"),
    ("finite", applies(lambda x: x * 1e5 / 1e5), "features of torch.float16"),
    ("empty", applies(lambda x: x + 0 * x.amax()), "was raised"),
    ("zero rows", applies(lambda x: x / x.norm(dim=1, keepdim=True)), "NaN or infinity"),
    ("input", applies(lambda x: x.mul_(2)), "features of torch.float32 were changed"),
    (
        "input",
        applies(lambda x: x.add_(1) if x.dtype == torch.float64 else x),
        "features of torch.float64 were changed",
    ),
    ("own result", loads(buffered), "overwritten by the next"),
    ("deterministic", loads(remembers), "the second result differs"),
    ("random numbers", doing(lambda: torch.rand(1)), "the generator of torch moved"),
    ("random numbers", doing(lambda: np.random.rand()), "the generator of numpy moved"),
    ("random numbers", doing(random.random), "the generator of python moved"),
    ("random numbers,loading", applies(noise_of_the_seed), "another seed gave another result"),
    ("gradient", applies(lambda x: (x * PARAMETER).to(x.dtype)), "decorate the call with @torch.no_grad()"),
    ("gradient", doing(lambda: torch.set_grad_enabled(False)), "gradients are off for the whole process"),
    ("row by row", applies(lambda x: x if len(x) != 1 else 2 * x, row_by_row=True), "of the largest value"),
    ("row by row,chunks", applies(lambda x: x - x.mean(0), row_by_row=True), "of the largest value"),
    ("chunks", applies(lambda x: x if len(x) <= 1024 else x - x.mean(0), row_by_row=True), "of the largest value"),
    ("order", applies(first_row_counts_twice), "of the largest value"),
    ("memory layout", applies(lambda x: x.view(-1).view(x.shape)), "RuntimeError was raised"),
    ("memory layout", applies(lambda x: torch.as_strided(x, x.shape, (D, 1))), "of the largest value"),
    ("autocast", applies(lambda x: (x.float() @ torch.eye(D, dtype=torch.float32)).to(x.dtype)), "enabled=False"),
    (
        "default dtype",
        applies(lambda x: x + torch.zeros(D) if x.dtype == torch.float32 else x),
        "torch.float64 [9, 16]",
    ),
    ("default dtype", doing(lambda: torch.set_default_dtype(torch.float32)), "it is torch.float32 after the call"),
    ("attributes", applies(lambda x: x, provenance="here"), "provenance is 'here'"),
    ("attributes", applies(lambda x: x, context={"ctx.0": [1.0]}), "context is"),
    ("attributes", applies(lambda x: x, context=None), "context is None"),
    ("attributes", applies(lambda x: x, row_by_row=1), "row_by_row is 1"),
    ("attributes", applies(lambda x: x, seeded=None), "seeded is None"),
    ("attributes", applies(lambda x: x, settings=["blend"]), "settings is ['blend']"),
    ("settings", lambda folder: Refuses(lambda bridge, settings: bridge), "an unknown setting was accepted"),
    ("settings", lambda folder: Refuses(lambda bridge, settings: Applies(lambda x: 2 * x)), "an unknown setting"),
    ("pairs", lambda folder: UsesPairs(False), "of the largest value"),
    ("score", lambda folder: MovesTwice(), "of the largest value"),
    ("loading", loads(random_weight), "the second differs"),
]


@pytest.mark.parametrize(("rules", "load", "words"), BROKEN, ids=[f"{r}-{w[:25]}" for r, _, w in BROKEN])
def test_what_breaks_a_rule_is_caught_and_named(rules, load, words):
    with pytest.raises(ConformanceError) as caught:
        check_bridge(load, dim=D)
    assert ",".join(caught.value.broken) == rules
    for name in caught.value.broken:
        assert f"- {name}: {BRIDGE_RULES[name].__doc__} Here" in str(caught.value)
    assert words in str(caught.value)


def test_every_rule_can_be_broken_alone():
    assert {rules for rules, _, _ in BROKEN} >= set(BRIDGE_RULES)


def test_all_that_is_broken_is_listed_and_what_cannot_be_called_stops_there():
    with pytest.raises(ConformanceError, match=r"the bridge breaks 2 of 22 rules:") as caught:
        check_bridge(applies(lambda x: x.float() / x.float().norm(dim=1, keepdim=True)), dim=D)
    assert list(caught.value.broken) == ["dtype", "zero rows"]

    def missing(folder):
        raise FileNotFoundError(f"no {folder}")

    with pytest.raises(ConformanceError, match="FileNotFoundError was raised: no None") as caught:
        check_bridge(missing, dim=D)
    assert list(caught.value.broken) == ["shape"]


def test_the_process_is_as_it_was_whatever_a_bridge_does():
    def careless(x):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return x

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    with pytest.raises(ConformanceError):
        check_bridge(applies(careless), dim=D)
    assert state() == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


# -- rules for fits ----------------------------------------------------------------------------------------------


def shift(features, *, pairs=seen_pairs, **config):
    """What the kit's own tests fit: the mean difference between texts and visual rows."""
    found = pairs(features)
    return Artifact("shift", config, {"shift.safetensors": {"shift": (found.text - found.visual).mean(0)}})


class Shift(Bridge):
    row_by_row = True

    def __init__(self, folder):
        super().__init__()
        artifact = Artifact.load(folder, "shift")
        self.provenance, self.context = artifact.provenance, artifact.context
        self.shift = artifact.files["shift.safetensors"]["shift"]

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat + self.shift.to(adapter_feat)


def test_a_fit_that_keeps_the_rules_gives_a_bridge_that_can_be_checked(tmp_path):
    folder = check_fit("shift", shift, tmp_path, dim=D)
    check_bridge(Shift, folder, dim=D)
    captured = synthetic_store(tmp_path / "test", split="test", dim=D)
    assert Shift(folder).provenance["fingerprint"] == captured.fingerprint
    assert set(Shift(folder).context) == {"ctx.0"}
    with pytest.raises(FeatureStoreError, match="holds a finished capture"):
        check_fit("shift", shift, tmp_path, dim=D)


def labelled(keep):
    """Pairs as an author may take them from a store by hand: keep(features, image, objects, target) -> which."""

    def pairs(features):
        row, target = features.rows("labels").nonzero().T
        kept = keep(features, features.image_index()[row], features.rows("objects")[row].long(), target)
        text = EzHoiScore.from_store(features).class_text[target[kept]]
        return SimpleNamespace(visual=features.adapter_feat()[row[kept]], text=text)

    return pairs


def seen_by_name(features):
    assert len(features.ezhoi["classes/unseen"])
    return seen_pairs(features)


BROKEN_FITS = [
    ("artefact", lambda features: {"shift": 1}, "a dict was returned"),
    ("artefact", lambda features: Artifact("other"), "it is one of 'other' instead of 'shift'"),
    ("artefact", lambda features: 1 / 0, "ZeroDivisionError was raised"),
    (
        "stored",
        lambda features: shift(features, point=(1, 2)),
        "config is {'point': [1, 2]} instead of {'point': (1, 2)}",
    ),
    ("stored", lambda features: Artifact("shift", {"names": {1}}), "BridgeError was raised"),
    ("deterministic", lambda features: shift(features, seed=torch.initial_seed()), "config is"),
    ("deterministic,unseen", lambda features: shift(features, noise=random.random()), "config is"),
    (
        "unseen",
        lambda features: shift(features, pairs=labelled(lambda *a: slice(None))),
        "shift in shift.safe",
    ),
    ("unseen", lambda f: Artifact("shift", {"counts": f.rows("gt_hoi").bincount().tolist()}), "config is"),
    ("unseen", lambda f: Artifact("shift", {"area": float(f.rows("gt_boxes").sum())}), "config is"),
    ("without split", lambda features: shift(features, pairs=seen_by_name), "KeyError was raised: 'classes/unseen'"),
]


@pytest.mark.parametrize(("rules", "fit", "words"), BROKEN_FITS, ids=[f"{r}-{w[:25]}" for r, _, w in BROKEN_FITS])
def test_what_breaks_a_rule_for_fits_is_caught_and_named(tmp_path, rules, fit, words):
    with pytest.raises(ConformanceError, match="fit 'shift' breaks") as caught:
        check_fit("shift", fit, tmp_path, dim=D)
    assert ",".join(caught.value.broken) == rules
    assert words in str(caught.value)
    assert not (tmp_path / "bridge").exists()


def test_every_rule_for_fits_can_be_broken_alone():
    assert {rules for rules, _, _ in BROKEN_FITS} >= set(FIT_RULES)


def test_a_bridge_that_needs_pairs_keeps_the_rules():
    check_bridge(lambda folder: UsesPairs(True), dim=D)


def test_a_function_is_a_bridge():
    check_bridge(lambda folder: lambda x: x.clone(), dim=D)
    with pytest.raises(BridgeError, match="forgot the"):
        as_bridge(UsesPairs)
    with pytest.raises(BridgeError, match="is no bridge"):
        as_bridge(3)
