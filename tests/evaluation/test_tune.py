"""The choice among bridges, on synthetic features with a known truth."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from ezhoi_diffusion import (
    Artifact,
    Bridge,
    BridgeError,
    BridgePlugin,
    DiffusionBridge,
    EzhoiDiffusionError,
    FeatureStore,
)
from ezhoi_diffusion.bridge import fingerprint_mismatch
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation import trials as trials_module
from ezhoi_diffusion.evaluation.average_precision import Scored, average_precision
from ezhoi_diffusion.evaluation.chain import with_members
from ezhoi_diffusion.evaluation.choice import load_choice, write_choice
from ezhoi_diffusion.evaluation.folds import Folds, protocol_of
from ezhoi_diffusion.evaluation.passes import Found
from ezhoi_diffusion.evaluation.protocols import Detections
from ezhoi_diffusion.evaluation.remake import RemakeError, recipes_of
from ezhoi_diffusion.evaluation.search import Space, choose, search
from ezhoi_diffusion.evaluation.trials import Step, Trial, Trials
from ezhoi_diffusion.evaluation.tune import TuneError, candidates_of, gain_of_choices, seen_classes, tune
from ezhoi_diffusion.evaluation.variants import Named
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import seen_pairs
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import Truth, synthetic_store, with_full_rank_texts

DIM = 32
QUICK = ["--train-steps", "15", "--denoiser-options", '{"width": 16, "depth": 1}', "--val-every", "5"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "test"):
        synthetic_store(folder / split, split=split, images=40)
    return folder


@pytest.fixture(scope="module")
def store(stores):
    return FeatureStore(stores / "train")


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("larger") / "train", images=100)


@pytest.fixture(scope="module")
def bridge(stores):
    assert main(["train", str(stores / "train"), "--out", str(stores / "bridge"), *QUICK]) == 0
    return stores / "bridge"


# bridges with a known effect


class Part(Bridge):
    """x -> x + share · (what x should be − x)."""

    row_by_row = True
    settings = ("share",)
    grid = {"share": (0.25, 1.0)}  # noqa: RUF012

    def __init__(self, share=0.5, seed=0):
        super().__init__()
        self.share, self.seed = share, seed

    def goal(self, x):
        return Truth.from_seed(dim=DIM, seed=self.seed).text_of(x) * x.norm(dim=1, keepdim=True)

    def forward(self, adapter_feat, pairs=None):
        return torch.lerp(adapter_feat, self.goal(adapter_feat), self.share)


class Shuffled(Part):
    """Moves towards a direction that says nothing."""

    def goal(self, x):
        draw = torch.Generator().manual_seed(self.seed + 1000)
        return x @ torch.linalg.qr(torch.randn(DIM, DIM, generator=draw)).Q


class Scale(Bridge):
    """x -> factor · x."""

    row_by_row = True
    settings = ("factor",)
    grid = {"factor": (4.0,)}  # noqa: RUF012

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat * self.factor


class ScaleControl(Scale):
    """The same as a baseline."""

    baseline = True


class Known(Bridge):
    """Moves features of verbs that it has labels of towards their texts, and spoils all others."""

    row_by_row = True

    def __init__(self, artifact):
        super().__init__()
        self.known, self.text = (
            artifact.files["known.safetensors"]["known"],
            artifact.files["known.safetensors"]["text"],
        )
        self.provenance = artifact.provenance

    def forward(self, adapter_feat, pairs=None):
        is_known = self.known[(adapter_feat @ self.text.T).argmax(1)].unsqueeze(1)
        better = Part(0.12)(adapter_feat)
        return torch.where(is_known, better, -adapter_feat)


def fit_known(features, seed=0):
    """The verbs that have labels."""
    score = EzHoiScore.from_store(features)
    known = torch.zeros(len(score.sample_lens), dtype=torch.bool)
    known[seen_pairs(features, held_out=None).target] = True
    tensors = {"known": known, "text": score.class_text, "seed": torch.tensor(seed)}
    return Artifact("known", {"seed": seed}, {"known.safetensors": tensors})


def load_known(folder):
    if folder is None:
        raise BridgeError("known needs its folder")
    return Known(Artifact.load(folder, "known"))


def plugins_with(**bridges):
    manager = PluginManager()
    for name, make in bridges.items():
        manager.register(BridgePlugin(name, lambda folder, make=make: make()), name)
    manager.register(BridgePlugin("known", load_known, fit_known), "known")
    return manager


def tuned(store, plugins, spec, folds=3, **options):
    candidates = candidates_of(store, spec, plugins, check=lambda *_: None, **options)
    return tune(store, candidates, plugins, folds=folds), candidates


# what is chosen


def test_a_bridge_that_helps_is_chosen_with_its_settings_and_an_honest_gain(larger, tmp_path):
    plugins = plugins_with(part=Part, shuffled=Shuffled)
    found, candidates = tuned(larger, plugins, "identity,part,shuffled")
    assert found.choice.helps
    assert found.choice.trial.name.startswith("part")
    assert found.choice.trial.value[0] > found.trials["none"].value[0]
    assert np.array_equal(found.trials["identity"].value, found.trials["none"].value)
    assert found.gain["criterion"].low > 0
    assert len(found.chosen_by_fold) == 3
    write_choice(tmp_path / "choice", found, candidates, larger)
    bridge = load_choice(tmp_path / "choice", plugins)
    assert not bridge.baseline
    assert bridge.settings == ()
    x = larger.adapter_feat()
    share = dict(found.choice.trial.chain[0].settings).get("share", 0.5)
    assert torch.equal(bridge(x), Part(share)(x))


def test_where_nothing_helps_none_is_chosen(tmp_path):
    chosen = []
    for seed in range(20):
        store = synthetic_store(tmp_path / str(seed), images=24, seed=seed)
        plugins = plugins_with(a=lambda seed=seed: Shuffled(0.05, seed), b=lambda seed=seed: Shuffled(0.1, seed + 50))
        candidates = candidates_of(store, "a,b", plugins, check=lambda *_: None, sweep={"share": [0.2]})
        chosen.append(tune(store, candidates, plugins, folds=3).choice.trial.name)
    assert chosen.count("none") >= 18


def test_a_gain_on_seen_classes_that_costs_hidden_ones_is_refused(larger, tmp_path):
    plugins = plugins_with()
    refused, _ = tuned(larger, plugins, "known")
    trial, none = refused.trials["known"], refused.trials["none"]
    assert trial.seen[0] > none.seen[0]
    assert trial.hidden[0] < none.hidden[0]
    assert refused.choice.trial.name == "none"
    assert not refused.choice.helps
    without_split = synthetic_store(tmp_path / "no-split", images=100, unseen=False)
    taken, _ = tuned(without_split, plugins, "known")
    assert taken.choice.trial.name == "known", "without hidden classes only the images count"
    assert np.isnan(taken.trials["known"].hidden).all()
    assert set(taken.gain) == {"criterion", "seen"}


def test_a_baseline_that_gains_is_recommended_and_counts_as_one(tmp_path):
    def unsure(batch):
        draw = torch.Generator().manual_seed(batch.index)
        scores = 0.02 + 0.98 * torch.rand(len(batch.pairs.scores), generator=draw) ** 3
        return replace(batch, pairs=replace(batch.pairs, scores=scores))

    store = synthetic_store(tmp_path / "unsure", images=100, alter=unsure)
    plugins = plugins_with(control=ScaleControl, bridge=Scale)
    found, candidates = tuned(store, plugins, "control,bridge")
    assert found.choice.trial.name.startswith("control")
    assert not found.choice.helps
    assert "baseline control" in found.choice.why
    write_choice(tmp_path / "choice", found, candidates, store)
    assert load_choice(tmp_path / "choice", plugins).baseline
    assert Artifact.load(tmp_path / "choice", "tuned").config["chosen"]["helps"] is False


def test_the_criterion_weighs_hidden_classes_as_the_split_weighs_unseen_ones(store):
    found, _ = tuned(store, plugins_with(), "known")
    share = len(store.ezhoi["classes/unseen"]) / len(store.ezhoi["classes/full"])
    trial = found.trials["known"]
    assert found.folds.class_weight == share
    assert np.allclose(trial.value, (1 - share) * trial.seen + share * trial.hidden, equal_nan=True)


def test_chains_grow_and_a_named_chain_is_tried_as_it_is(store):
    plugins = plugins_with(part=lambda: Part(0.2), other=lambda: Part(0.21))
    found, _ = tuned(store, plugins, "part,other", folds=3, sweep={})
    assert {"part", "other"} <= set(found.trials)
    assert {"part+other", "other+part"} & set(found.trials)
    named, _ = tuned(store, plugins, "other+part", folds=3, sweep={"other.share": [0.3]})
    assert set(named.trials) == {"none", "other+part", "other[share=0.3]+part"}


def test_folds_whose_choices_score_on_other_scales_are_not_ranked_together(tmp_path):
    def sure(batch):
        return replace(batch, pairs=replace(batch.pairs, scores=torch.ones_like(batch.pairs.scores)))

    store = synthetic_store(tmp_path / "sure", images=100, alter=sure)
    plugins = plugins_with(part=Part, half=lambda: Scale(0.25))
    candidates = candidates_of(store, "half", plugins, check=lambda *_: None, sweep={})
    trials = Trials(
        store, candidates.recipes, candidates.bridges, Folds.of_store(store, 3), replicates=20, plugins=plugins
    )
    gain = gain_of_choices(trials, [(Step(0),), (), ()])["criterion"]
    assert abs(gain.difference) < 0.01, "without priors a scale changes no order"
    assert -0.01 < gain.low <= gain.high < 0.01


# the rule


def trial(name, gain, *, spread=0.1, members=1, change=1.0, baseline=False, seed=0):
    noise = np.random.default_rng(seed).normal(size=201)
    value = 40 + gain + spread * np.r_[0, noise[1:]]
    step = () if name == "none" else (object(),) * members
    return Trial(step, name, value, value, value, change, baseline)


def chosen(*trials):
    return choose({one.name: one for one in (trial("none", 0, spread=0, members=0, baseline=True), *trials)})


def test_the_simplest_within_one_standard_error_wins():
    best = trial("a+b", 2.0, members=2, seed=1)
    assert chosen(best, trial("a", 1.95, seed=2)).trial.name == "a"
    assert chosen(best, trial("a", 1.0, seed=2)).trial.name == "a+b"
    milder = trial("a[x=1]", 1.97, change=0.5, seed=3)
    assert chosen(best, trial("a", 1.95, seed=2), milder).trial.name == "a[x=1]"


def test_none_wins_what_chance_explains():
    choice = chosen(trial("a", 0.15, seed=1))
    assert choice.trial.name == "none"
    assert choice.leader.name == "a"
    assert chosen().leader is None
    lucky = [trial(f"a{k}", 0.22, seed=k) for k in range(100)]
    assert chosen(lucky[0]).trial.name == "a0"
    assert chosen(*lucky).trial.name == "none", "one of a hundred has to lead by more"


def test_a_bridge_has_to_beat_the_best_baseline():
    control = trial("scale", 1.0, baseline=True, seed=1)
    assert chosen(control, trial("a", 1.05, seed=2)).trial.name == "scale"
    assert chosen(control, trial("a", 2.0, seed=2)).trial.name == "a"
    weak = trial("scale", 0.1, baseline=True, seed=1)
    assert chosen(weak, trial("a", 0.1, seed=2)).trial.name == "none"


# the search


def searched(space, value_of):
    """The trials of a search, and the chains that it ran."""
    ran = []

    def run(chains):
        ran.extend(chains)
        values = [np.array([value_of(chain)]) for chain in chains]
        return [
            Trial(chain, str(chain), value, value, value, 0.0, not chain)
            for chain, value in zip(chains, values, strict=True)
        ]

    return search(space, run), ran


def test_no_chain_is_tried_twice_and_a_value_that_a_bridge_has_is_no_setting():
    grids = [{"a": (0, 1, 2)}, {"b": (0, 1)}, {}]
    space = Space([(0,), (1,)], [2], grids, [{"a": 1}, {"b": 0}, {}], ["x", "y", "z"], [False] * 3)
    trials, ran = searched(space, lambda chain: sum(1 + sum(value for _, value in step.settings) for step in chain))
    assert len(ran) == len(trials) == len({str(chain) for chain in ran})
    settings = {setting for chain in ran for step in chain for setting in step.settings}
    assert settings == {("a", 0), ("a", 2), ("b", 1)}
    best = max(trials.values(), key=lambda trial: trial.value[0])
    assert best.chain == (Step(0, (("a", 2),)), Step(1, (("b", 1),)))


def test_a_chain_has_each_bridge_once_also_from_two_folders():
    space = Space([(0,), (1,), (2,)], [], [{}, {}, {}], [{}, {}, {}], ["x", "x", "y"], [False] * 3)
    _, ran = searched(space, len)
    assert max(map(len, ran)) == 2
    assert not any({0, 1} <= {step.part for step in chain} for chain in ran)


def test_an_item_enters_a_chain_with_what_was_best_alone_and_before_bridges_on_scores():
    grids = [{"a": (0, 1)}, {"b": (0, 1)}, {}]
    space = Space([(0,), (1,), (2,)], [], grids, [{"a": 0}, {"b": 0}, {}], ["x", "y", "z"], [True, False, False])
    weight = {0: 30, 1: 10, 2: 1}

    def value_of(chain):
        return sum(weight[step.part] + sum(value for _, value in step.settings) for step in chain)

    trials, ran = searched(space, value_of)
    best = max(trials.values(), key=lambda trial: trial.value[0])
    assert best.chain == (Step(1, (("b", 1),)), Step(2), Step(0, (("a", 1),)))
    pairs = [chain for chain in ran if len(chain) == 2]
    assert (Step(1), Step(0, (("a", 1),))) not in pairs[:2]
    assert all(chain[-1].part == 0 for chain in pairs)


def test_settings_of_one_bridge_share_what_it_samples(store, bridge, mocker):
    plugins = PluginManager()
    candidates = candidates_of(store, f"diffusion={bridge}", plugins, check=lambda *_: None)
    folds = Folds.of_store(store, 3)
    trials = Trials(store, candidates.recipes, candidates.bridges, folds, replicates=20, plugins=plugins)
    sampled = []
    sample = DiffusionBridge.sample
    mocker.patch.object(DiffusionBridge, "sample", lambda self, z: sampled.append(len(z)) or sample(self, z))
    blends = trials.run([(Step(0, (("blend", blend),)),) for blend in (0.1, 0.3, 1.0)])
    checked = len(folds.images) * len(blends) * max(image["rows"] for image in store.images)
    assert sum(sampled) <= len(store) + checked, "each pair once, and an image of each fold alone"
    assert len({float(trial.change) for trial in blends}) == 3
    for trial in blends:
        (alone,) = trials.run([trial.chain])
        assert np.array_equal(alone.value, trial.value)
        assert alone.change == trial.change


def test_constants_of_ez_hoi_are_held_once_and_what_was_learned_apart(store):
    store, plugins = with_full_rank_texts(store), plugins_with()
    candidates = candidates_of(store, "interactive", plugins, check=lambda *_: None)
    trials = Trials(
        store, candidates.recipes, candidates.bridges, Folds.of_store(store, 3), replicates=20, plugins=plugins
    )
    made = [
        *candidates.bridges,
        *(trials.made[0, 0, frozenset({fold}), part] for fold in range(3) for part in (None, 0)),
    ]
    for name in ("matrix", "inverse", "allowed"):
        assert len({getattr(bridge, name).data_ptr() for bridge in made}) == 1
    learned = {bridge: bridge.coefficient for bridge in made}
    assert len({coefficient.data_ptr() for coefficient in learned.values()}) == len(learned) > 3
    assert len({tuple(coefficient.tolist()) for coefficient in learned.values()}) == len(learned)


class Lazy(Bridge):
    """Adds what it learned, from a table that its first call fills."""

    row_by_row = True

    def __init__(self, learned):
        super().__init__()
        self.learned = learned
        self.register_buffer("table", torch.zeros(1))

    def forward(self, adapter_feat, pairs=None):
        if not self.table.any():
            self.table += self.learned
        return adapter_feat + self.table


def lazy(folder):
    return Lazy(Artifact.load(folder).files["lazy.safetensors"]["mean"])


def fit_lazy(features):
    return Artifact(
        "lazy", {"of": {1: 1, "a": 2}}, {"lazy.safetensors": {"mean": features.adapter_feat().mean()[None]}}
    )


def test_a_bridge_that_fills_a_buffer_when_it_is_called_fills_its_own(store):
    plugins = PluginManager()
    plugins.register(BridgePlugin("lazy", lazy, fit_lazy), "lazy")
    candidates = candidates_of(store, "lazy", plugins, check=lambda *_: None)
    trials = Trials(
        store, candidates.recipes, candidates.bridges, Folds.of_store(store, 3), replicates=20, plugins=plugins
    )
    made = [*candidates.bridges, *(trials.made[0, 0, frozenset({fold}), None] for fold in range(3))]
    for bridge in made:
        bridge(torch.zeros(1, 32))
        assert torch.equal(bridge.table, bridge.learned)
    assert len({float(bridge.learned) for bridge in made}) == 4


def mean_ap_by_hand(trials, chain, folds, *, outer=None, hidden):
    """Mean AP in percent on some folds, image by image: of all seen classes, or of each by the bridges that lack its labels."""
    found, annotated = [], torch.zeros(0, dtype=torch.long)
    images = list(stored_images(trials.store))
    for fold in folds:
        for part in range(len(trials.folds.classes)) if hidden else [None]:
            classes = trials.seen if part is None else trials.folds.classes[part]
            made = [trials.made[step.part, 0, frozenset({fold, outer} - {None}), part] for step in chain]
            for position in trials.folds.images[fold]:
                image = images[position]
                hoi = image.gt_hoi.long()
                annotated = torch.cat([annotated, hoi[torch.isin(hoi, classes)]])
                features = image.adapter_feat
                for one in made:
                    features = one(features, image.pairs)
                detections = Detections.from_images([image], protocol_of(trials.store).match)
                logits = trials.score.class_logits(features) if chain else image.logits
                scores = detections.scores(logits)
                kept = torch.isin(detections.classes, classes)
                columns = (
                    scores,
                    detections.classes,
                    detections.labels(scores),
                    torch.full_like(scores, position).long(),
                )
                found.append([column[kept] for column in columns])
    scored = Scored(*(torch.cat(column) for column in zip(*found, strict=True)))
    counts = annotated.bincount(minlength=int(trials.seen.max()) + 1)
    return 100 * float(average_precision(scored, counts)[counts > 0].mean())


def crowded(batch):
    """Boxes of one class at one place, so that pairs compete for an annotation, and every annotation twice."""
    boxes, classes = batch.pairs.boxes, batch.pairs.classes
    first = (classes[:, None] == classes).int().argmax(1)
    pairs = replace(batch.pairs, boxes=boxes[first])
    return replace(batch, pairs=pairs, gt_boxes=batch.gt_boxes.repeat(1, 2, 1), gt_hoi=batch.gt_hoi.repeat(2))


@pytest.mark.parametrize("outer", [None, 1])
def test_each_class_is_scored_by_bridges_that_lack_its_labels(tmp_path, outer):
    store = synthetic_store(tmp_path / "crowded", images=40, alter=crowded)
    plugins = plugins_with(part=Part)
    candidates = candidates_of(store, "known,part", plugins, check=lambda *_: None)
    dealt = Folds.of_store(store, 3)
    trials = Trials(store, candidates.recipes, candidates.bridges, dealt, replicates=20, plugins=plugins)
    folds = [fold for fold in range(3) if fold != outer]
    for chain in ([], [Step(0)], [Step(1), Step(0)]):
        (trial,) = trials.run([tuple(chain)], outer)
        by_hand = {
            hidden: mean_ap_by_hand(trials, chain, folds, outer=outer, hidden=hidden) for hidden in (False, True)
        }
        assert float(trial.seen[0]) == pytest.approx(by_hand[False], abs=1e-9)
        assert float(trial.hidden[0]) == pytest.approx(by_hand[True], abs=1e-9)
        assert (abs(by_hand[True] - by_hand[False]) > 1) == (Step(0) in chain), (
            "known helps the classes it has labels of"
        )


def test_chains_are_scored_alike_alone_and_together_and_few_are_held(store, bridge, monkeypatch):
    plugins = plugins_with(part=Part)
    candidates = candidates_of(store, f"known,part,mean_shift,diffusion={bridge}", plugins, check=lambda *_: None)
    folds = Folds.of_store(store, 3)
    trials = Trials(store, candidates.recipes, candidates.bridges, folds, replicates=20, plugins=plugins)
    tried = [(), (Step(0),), (Step(3),), (Step(1),), (Step(0), Step(1)), (Step(2),)]
    monkeypatch.setattr(Trials, "seeds", lambda self, chain: 2 if (Step(3),) == chain else 1)
    together = trials.run(tried)
    of_chain = sum(len(block.detections.classes) for fold in trials.blocks for block in fold)
    made, passes = [], []

    class Watched(Found):
        def __init__(self, detections, classes, differs):
            assert not any(earlier() is not None for earlier in made), "an earlier pass is still held"
            made.append(weakref.ref(self))
            passes.append(len(differs))
            super().__init__(detections, classes, differs)

    monkeypatch.setattr(trials_module, "Found", Watched)
    for most, expected in ((2 * of_chain, [2, 2, 2, 1]), (0, [1] * 7)):
        monkeypatch.setattr(trials_module, "MAX_SCORES", most)
        passes.clear()
        few = trials.run(tried)
        assert passes == expected
        for one, other in zip(together, few, strict=True):
            assert one.chain == other.chain
            for figure in ("value", "seen", "hidden", "change"):
                assert np.array_equal(getattr(one, figure), getattr(other, figure))
    assert len({float(trial.change) for trial in together}) == len(tried)


def test_the_expected_number_of_trials_is_that_of_a_search_in_which_every_round_gains():
    space = Space([(part,) for part in range(4)], [], [{"a": (1, 2)}] * 4, [{"a": 1}] * 4, list("abcd"), [False] * 4)
    expected = space.expected_trials()
    _, ran = searched(space, lambda chain: sum(2 + bool(step.settings) for step in chain))
    assert len(expected) == 4
    assert sum(expected) == pytest.approx(len(ran), rel=0.25)


# what fits may know


def test_no_label_of_a_held_out_image_or_class_reaches_a_fit_or_the_choice(store, tmp_path):
    folds = Folds.of_store(store, 3)
    secret = set(folds.images[1])

    def poison(batch):
        if batch.index not in secret:
            return batch
        return replace(batch, labels=~batch.labels, gt_boxes=batch.gt_boxes / 2)

    poisoned = synthetic_store(tmp_path / "poisoned", images=40, alter=poison)
    plugins = plugins_with(part=Part)
    results = []
    for one in (store, poisoned):
        candidates = candidates_of(one, "known,part", plugins, check=lambda *_: None)
        trials = Trials(one, candidates.recipes, candidates.bridges, folds, replicates=20, plugins=plugins)
        results.append((trials, *trials.run([()], outer=1), trials.run(chains(candidates), outer=1)))
    (trials, none, found), (others, other_none, other_found) = results
    assert np.array_equal(none.value, other_none.value)
    for one, other in zip(found, other_found, strict=True):
        assert np.array_equal(one.value, other.value, equal_nan=True)
    assert not np.array_equal(trials.run([()])[0].value, others.run([()])[0].value)
    for hidden, classes in enumerate(folds.classes):
        (known,) = (trials.made[0, 0, frozenset({0}), hidden].known for _ in range(1))
        verbs = store.ezhoi["object_n_verb_to_interaction"]
        for verb in range(verbs.shape[1]):
            if set(verbs[:, verb][verbs[:, verb] >= 0].tolist()) <= {
                *classes.tolist(),
                *store.ezhoi["classes/unseen"].tolist(),
            }:
                assert not known[verb]


def chains(candidates):
    return [(Step(0),), (Step(0), Step(1))]


def test_folds_hold_every_image_once_and_whole_verbs(store):
    folds = Folds.of_store(store, 4)
    assert sorted(position for fold in folds.images for position in fold) == list(range(len(store.images)))
    assert sorted(torch.cat(folds.classes).tolist()) == sorted(seen_classes(store).tolist())
    table = store.ezhoi["object_n_verb_to_interaction"]
    verb_of = {int(table[o, v]): v for o in range(len(table)) for v in range(table.shape[1]) if table[o, v] >= 0}
    verbs = [{verb_of[int(k)] for k in fold} for fold in folds.classes]
    assert sum(map(len, verbs)) == len(set.union(*verbs))


def test_annotations_of_hidden_classes_do_not_move_the_choice(tmp_path):
    store = synthetic_store(tmp_path / "plain", images=40)
    unseen = store.ezhoi["classes/unseen"]

    def strip(batch):
        kept = ~torch.isin(batch.gt_hoi, unseen)
        return replace(batch, gt_hoi=batch.gt_hoi[kept], gt_boxes=batch.gt_boxes[:, kept])

    stripped = synthetic_store(tmp_path / "stripped", images=40, alter=strip)
    one, other = (tuned(each, plugins_with(part=Part), "part", folds=3)[0] for each in (store, stripped))
    assert all(np.array_equal(one.trials[name].value, other.trials[name].value) for name in one.trials)


def test_test_images_and_too_few_images_are_refused(stores, tmp_path):
    with pytest.raises(TuneError, match="cannot be tested on them"):
        tuned(FeatureStore(stores / "test"), plugins_with(), "known")
    few = synthetic_store(tmp_path / "few", images=6)
    with pytest.raises(TuneError, match="too few"):
        tuned(few, plugins_with(part=Part), "part", folds=7)


# how bridges are made again


def made_again(folder, store, name="diffusion"):
    recipes = recipes_of(Named(name, str(folder)), plugins_with(), {}, 1, lambda *_: None)
    return recipes.make(store, plugins_with())[0]


def test_a_bridge_of_texts_keeps_its_network_and_gets_the_means_of_the_fold(store, bridge):
    part = store.subset(range(20))
    before, again = DiffusionBridge.from_pretrained(bridge), made_again(bridge, part)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in before.state_dict().items())
    assert torch.equal(again.statistics.visual_mean, part.statistics().visual_mean)
    assert not torch.equal(again.statistics.visual_mean, before.statistics.visual_mean)


def test_a_bridge_of_pairs_is_trained_again(stores, store, tmp_path):
    line = ["train", str(stores / "train"), "--recipe", "paired", *QUICK, "--out", str(tmp_path / "paired")]
    assert main(line) == 0
    again = made_again(tmp_path / "paired", store)
    before = DiffusionBridge.from_pretrained(tmp_path / "paired")
    assert all(torch.equal(again.state_dict()[name], x) for name, x in before.state_dict().items()), (
        "from the same data"
    )
    part = store.subset(range(20))
    assert made_again(tmp_path / "paired", part).provenance["features"]["images"] == 20


def test_a_fit_is_repeated_with_its_options(stores, store, tmp_path, monkeypatch):
    from ezhoi_diffusion.training.fitted import fit_artifact

    fit_artifact("known", fit_known, store, {"seed": 7}).save(tmp_path / "known")
    recipes = recipes_of(Named("known", str(tmp_path / "known")), plugins_with(), {}, 1, lambda *_: None)
    _, artifact = recipes.make(store, plugins_with())
    assert artifact.config["seed"] == 7


def test_what_cannot_be_made_again_is_refused(store, bridge, tmp_path):
    unknown = Artifact("known", {}, fit_known(store).files, {"fingerprint": store.fingerprint})
    unknown.save(tmp_path / "unknown")
    with pytest.raises(RemakeError, match="cannot be made again without the held-out images"):
        made_again(tmp_path / "unknown", store, "known")
    for name in ("tuned", "chain"):
        with pytest.raises(RemakeError, match="made of other bridges"):
            made_again(tmp_path, store, name)


# the command


def test_a_choice_on_some_images_says_so_and_is_made_from_all(larger, tmp_path):
    plugins = plugins_with(part=Part)
    candidates = candidates_of(larger, "known,part", plugins, check=lambda *_: None, sweep={})
    found = tune(larger, candidates, plugins, folds=3, num_images=60)
    assert (found.images, found.captured) == (60, 100)
    assert "The choice was made on 60 of 100 images, drawn at random from those with pairs." in found.caveats()
    assert found.evidence()["captured"] == 100
    known = replace(found, choice=replace(found.choice, trial=found.trials["known"]))
    write_choice(tmp_path / "choice", known, candidates, larger)
    assert Artifact.load(tmp_path / "choice", "tuned").provenance["features"]["images"] == 100
    every = tune(larger, candidates, plugins, folds=3, num_images=1000)
    assert every.images == 100
    assert not any("drawn at random" in line for line in every.caveats())
    with pytest.raises(TuneError, match="too few for 3 folds"):
        tune(larger, candidates, plugins, folds=3, num_images=2)


def test_a_fold_without_annotations_is_refused_before_the_work_begins(tmp_path):
    secret = []

    def strip(batch):
        if batch.index not in secret:
            return batch
        return replace(batch, gt_hoi=batch.gt_hoi[:0], gt_boxes=batch.gt_boxes[:, :0])

    secret += Folds.of_store(synthetic_store(tmp_path / "plain", images=30), 3).images[2]
    store = synthetic_store(tmp_path / "stripped", images=30, alter=strip)
    with pytest.raises(TuneError, match="one of 3 folds has no annotation of a seen class in its 10 images"):
        tuned(store, plugins_with(part=Part), "part")


def test_a_bridge_that_returns_its_input_changes_nothing(store):
    found, _ = tuned(store, plugins_with(), "identity")
    assert found.trials["identity"].change == 0.0


def test_the_choice_is_a_bridge_of_its_own(stores, bridge, tmp_path, capsys):
    out = tmp_path / "choice"
    line = ["tune", str(stores / "train"), "--bridges", f"identity,mean_shift,diffusion={bridge}", "--folds", "3"]
    assert main([*line, "--sweep", "blend=0.3,1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "<- chosen" in printed
    assert "EZ-HOI itself was trained on these images" in printed
    assert "Estimate: about" in printed
    artifact = Artifact.load(out, "tuned")
    evidence = artifact.config["evidence"]
    assert {"none", "identity", "mean_shift", f"diffusion={bridge}"} <= set(evidence["candidates"])
    assert artifact.config["chosen"]["name"] in evidence["candidates"]
    assert set(evidence["gain_of_choosing"]) == {"criterion", "seen", "hidden"}
    assert artifact.provenance["fingerprint"]["backbone"] == "synthetic"
    moved = out.rename(tmp_path / "moved")
    report = tmp_path / "report"
    compare = ["compare", str(stores / "test"), "--bridges", f"none,tuned={moved}", "--replicates", "0"]
    assert main([*compare, "--out", str(report)]) == 0
    variants = {one["name"]: one for one in json.loads((report / "report.json").read_text())["variants"]}
    assert variants[f"tuned={moved}"]["provenance"]["chosen"] == artifact.config["chosen"]
    assert main([*line, "--out", str(stores / "train")]) == 2, "a folder in use"


def test_all_seeds_of_a_choice_are_written(larger, tmp_path):
    plugins = plugins_with()
    candidates = candidates_of(larger, "known", plugins, check=lambda *_: None, seeds=2)
    found = tune(larger, candidates, plugins, folds=3)
    by_hand = replace(found, choice=replace(found.choice, trial=found.trials["known"]))
    write_choice(tmp_path / "choice", by_hand, candidates, larger)
    seeds = sorted(path.name for path in (tmp_path / "choice").iterdir())
    assert seeds == ["seed-0", "seed-1"]
    configs = [Artifact.load(tmp_path / "choice" / seed / "1-known").config["seed"] for seed in seeds]
    assert configs == [0, 1]
    assert load_choice(tmp_path / "choice" / "seed-1", plugins).names == ("known",)


def test_what_was_forced_stays_so_in_the_choice(stores, bridge, tmp_path, capsys):
    other = DiffusionBridge.from_pretrained(bridge)
    other.provenance["fingerprint"]["weights"] = "0" * 64
    other.save_pretrained(tmp_path / "other")
    line = [
        "tune",
        str(stores / "train"),
        "--bridges",
        f"diffusion={tmp_path / 'other'}",
        "--folds",
        "3",
        "--sweep",
        "blend=1",
    ]
    assert main([*line, "--out", str(tmp_path / "c")]) == 2
    assert main([*line, "--out", str(tmp_path / "c"), "--force"]) == 0
    assert len(Artifact.load(tmp_path / "c", "tuned").provenance["forced"]) == 1
    assert "FORCED" in capsys.readouterr().out


@pytest.mark.parametrize("config", [{}, {"members": []}, {"members": [], "chosen": 5}])
def test_a_choice_that_says_nothing_is_refused(tmp_path, config):
    Artifact("tuned", config).save(tmp_path / "choice")
    with pytest.raises(EzhoiDiffusionError):
        load_choice(tmp_path / "choice", PluginManager())
    with pytest.raises(EzhoiDiffusionError, match="tune"):
        load_choice(None, PluginManager())


def test_values_out_of_range_and_unknown_names_are_refused(stores, tmp_path):
    line = ["tune", str(stores / "train"), "--out", str(tmp_path / "c")]
    for words in (["--folds", "2"], ["--seeds", "0"], ["--bridges", "nobody"], ["--bridges", "tuned=x"]):
        assert main([*line, *words]) == 2


def test_values_of_a_grid_that_a_bridge_refuses_are_left_out_and_in_a_sweep_are_errors(store):
    class Picky(Part):
        def apply_settings(self, settings):
            if settings["share"] > 0.5:
                raise BridgeError("too much")
            super().apply_settings(settings)

    plugins = plugins_with(picky=Picky)
    assert candidates_of(store, "picky", plugins, check=lambda *_: None).grids == [{"share": [0.25]}]
    with pytest.raises(BridgeError, match="too much"):
        candidates_of(store, "picky", plugins, check=lambda *_: None, sweep={"share": [1.0]})


def test_a_setting_that_no_candidate_has_is_refused(store):
    plugins = plugins_with(part=Part)
    for options in ({"settings": {"shore": 1}}, {"sweep": {"other.share": [1]}}):
        with pytest.raises(TuneError, match="has a setting"):
            candidates_of(store, "part", plugins, check=lambda *_: None, **options)
    assert (
        candidates_of(store, "part", plugins, check=lambda *_: None, settings={"part.share": 0.1}).bridges[0].share
        == 0.1
    )


@pytest.mark.parametrize("chain", [(), (Step(0, (("factor", 3.0),)),)])
def test_a_choice_of_none_or_of_a_baseline_is_a_baseline_of_a_comparison(stores, store, tmp_path, chain, capsys):
    plugins = plugins_with()
    found, candidates = tuned(store, plugins, "scale", sweep={})
    trial = replace(found.trials["scale"], chain=chain)
    choice = tmp_path / "choice"
    write_choice(choice, replace(found, choice=replace(found.choice, trial=trial)), candidates, store)
    line = ["compare", str(stores / "test"), "--bridges", f"identity,tuned={choice}", "--replicates", "100"]
    assert main([*line, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    baselines = [one["name"] for one in report["variants"] if one["baseline"]]
    assert baselines == ["identity", f"tuned={choice}"]
    assert "Only baselines were compared" in capsys.readouterr().out


def test_few_replicates_are_refused(stores, capsys):
    assert main(["compare", str(stores / "test"), "--bridges", "identity", "--replicates", "10"]) == 2
    assert "0 or at least 100" in capsys.readouterr().err


def test_a_choice_of_bridges_that_fit_every_run_still_belongs_to_its_run(store, tmp_path):
    plugins = plugins_with(part=Part)
    found, candidates = tuned(store, plugins, "part", sweep={})
    write_choice(
        tmp_path / "choice", replace(found, choice=replace(found.choice, trial=found.trials["part"])), candidates, store
    )
    bridge = load_choice(tmp_path / "choice", plugins)
    (checked,) = [one for one, _ in with_members(bridge, "tuned")]
    assert fingerprint_mismatch(checked, "tuned", store.fingerprint) is None
    assert fingerprint_mismatch(checked, "tuned", {**store.fingerprint, "weights": "0"}).fields == {"weights"}
