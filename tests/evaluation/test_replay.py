"""Scores from stored features equal those of EZ-HOI itself; `compare` and `test` on them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.comparison import Comparison, VariantResult
from ezhoi_diffusion.evaluation.effect import Effect, effect_of, verdict
from ezhoi_diffusion.evaluation.replay import _report_time_left, replay
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, require_replayable
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import ezhoi_flags, launch, printed_by_ezhoi, rows_of, same_figures


@pytest.fixture(scope="module")
def stores(small_world, tmp_path_factory):
    """Captures of both splits of one miniature EZ-HOI."""
    folder = tmp_path_factory.mktemp("stores")
    for split in ("train", "test"):
        flags = ezhoi_flags(small_world, evaluate=True)
        done = launch(*flags, "--plugin", "capture", "--capture", str(folder / split), "--capture-split", split)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def bridge(stores, tmp_path_factory):
    out = tmp_path_factory.mktemp("bridge") / "bridge"
    assert (
        main(["train", str(stores / "train"), "--out", str(out), "--train-steps", "20", "--learning-rate", "0.01"]) == 0
    )
    return out


def test_replayed_tables_equal_those_of_ezhoi_and_ap_to_the_last_digit(small_world, stores, bridge, tmp_path, capsys):
    names = "none,identity,scale,mean_shift,diffusion"
    # the world's EZ-HOI is untrained, and only a change of norms moves its mAP
    strongly = ["--bridge", str(bridge), "--set", "blend=1", "--set", "output=unit_norm", "--set", "scale.factor=0.2"]
    flags = ezhoi_flags(small_world, evaluate=True)
    live = launch(*flags, *strongly, "--compare", names, "--out", str(tmp_path / "live"))
    assert live.returncode == 0, live.stderr
    line = ["compare", str(stores / "test"), *strongly, "--bridges", names, "--out", str(tmp_path / "offline")]
    assert main(line) == 0
    replayed = rows_of(capsys.readouterr().out)
    for name, row in rows_of(live.stdout).items():
        assert replayed[name] == row, name
    assert len({tuple(replayed[name].items()) for name in names.split(",")}) > 2, "the bridges must differ"
    bare = launch(*flags)
    assert bare.returncode == 0, bare.stderr
    assert same_figures(replayed["none"], printed_by_ezhoi(bare.stdout))
    there, here = (
        {variant["name"]: variant["per_class_ap"] for variant in json.loads(path.read_text())["variants"]}
        for path in (tmp_path / "live" / "report.json", tmp_path / "offline" / "report.json")
    )
    assert there["none"] == here["none"]


def test_the_score_equals_that_of_ezhoi_to_rounding_and_another_formula_is_refused(stores, mocker):
    store = FeatureStore(stores / "test")
    score = EzHoiScore.from_store(store)
    assert require_replayable(store, score) < 1e-6
    features, logits = store.adapter_feat(), store.rows("logits")
    torch.testing.assert_close(score.logits(features), logits, rtol=0, atol=1e-5)
    mocker.patch.dict(store.ezhoi, logit_scale=store.ezhoi["logit_scale"] * 1.01)
    applied = []

    class Spy(Bridge):
        def forward(self, adapter_feat, pairs=None):
            applied.append(pairs)
            return adapter_feat

    with pytest.raises(ScoreError, match="this run scores differently"):
        replay(store, {"spy": Variant("spy", Spy())})
    assert not applied, "another score is refused before any work"
    del store.ezhoi["logit_scale"]
    with pytest.raises(ScoreError, match=r"lacks logit_scale.*--use_weight_pred"):
        EzHoiScore.from_store(store)


def test_a_long_comparison_says_once_how_long_it_takes(stores, mocker, capsys):
    replay(FeatureStore(stores / "test"), {})
    assert "minutes" not in capsys.readouterr().err
    mocker.patch.multiple("ezhoi_diffusion.evaluation.replay", MEASURED_SECONDS=0.0, LONG=0.0, MAX_PAIRS=1)
    replay(FeatureStore(stores / "test"), {})
    assert capsys.readouterr().err.count("minutes more; --jobs") == 1


def test_the_time_left_is_that_of_the_batches_that_are_like_the_others(mocker):
    progress = mocker.Mock(n=0, total=1000, format_dict={"elapsed": 0})
    # the first batches time single images and start processes
    for seconds, _ in zip((500, 200, 4, 2, 2, 2), _report_time_left(range(6), progress, False), strict=False):
        progress.n += 10
        progress.format_dict["elapsed"] += seconds
    # after the fourth batch: 6 seconds for 20 images, and 960 more
    progress.write.assert_called_once_with("compare: about 4.8 minutes more", file=sys.stderr)


def test_stored_images_have_the_features_in_order(stores):
    store = FeatureStore(stores / "test")
    images = list(stored_images(store))
    assert [image.name for image in images] == [entry["name"] for entry in store.images]
    assert torch.equal(torch.cat([image.adapter_feat for image in images]), store.adapter_feat())
    assert torch.equal(torch.cat([image.pairs.objects for image in images]), store.rows("objects").long())
    assert [image.name for image in stored_images(store, {1, 3})] == [images[1].name, images[3].name]


def test_every_bridge_sees_one_image_at_a_time_and_only_those_chosen(stores):
    store = FeatureStore(stores / "test")
    seen = []

    class Spy(Bridge):
        needs_pairs = True

        def forward(self, adapter_feat, pairs=None):
            seen.append((pairs.image, len(adapter_feat)))
            return adapter_feat

    chosen = {i for i, entry in enumerate(store.images) if entry["rows"]}
    few = set(sorted(chosen)[:3])
    comparison = replay(store, {"spy": Variant("spy", Spy())}, chosen=few)
    assert seen == [(store.images[i]["name"], store.images[i]["rows"]) for i in sorted(few)]
    assert comparison.images == 3
    annotated = {hoi for image in stored_images(store, few) for hoi in image.gt_hoi.tolist()}
    assert set(comparison.groups["full"].tolist()) == annotated
    assert comparison.mean_ap("spy", "full") == comparison.mean_ap("none", "full")


def test_a_perfect_bridge_is_right_everywhere(stores):
    """Rows whose logits are the annotations: every pair is right whose object the detector named rightly."""
    store = FeatureStore(stores / "test")
    score = EzHoiScore.from_store(store)
    # the score is linear in x, so a row with given logits is a least-squares solution
    matrix = score.logits(torch.eye(store.text.shape[1]))
    labels = iter(image.labels for image in stored_images(store) if len(image.pairs))

    def oracle(feature, pairs):
        wanted = next(labels).float() * 8 - 4
        return torch.linalg.lstsq(matrix.T, wanted.T, driver="gelsd").solution.T

    effect = effect_of(store, oracle, set(range(len(store.images))), 5)
    before, after = effect.accuracy()
    known = effect.labels.any(1)
    reachable = (effect.labels & effect.possible).any(1)[known].double().mean()
    assert after == float(reachable) > before
    assert effect.outcome()["to wrong"] == 0 < effect.outcome()["to right"]


def test_the_test_command_writes_pictures_and_a_verdict(stores, bridge, tmp_path, capsys):
    out = tmp_path / "looks"
    line = ["test", str(stores / "test"), "--bridge", str(bridge), "--num-test-images", "4", "--embedding", "tsne"]
    assert main([*line, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((out / "effect.json").read_text())
    assert "\n".join(facts["verdict"]) in printed
    assert len(facts["predictions"]) == 4
    for image in facts["predictions"]:
        assert len(image["before"]) == 5
        scores = [found["score"] for found in image["before"]]
        assert scores == sorted(scores, reverse=True)
        assert image["before"][0]["interaction"].startswith("a person ")
    for name in ("diffusion_effect.png", "tsne.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    images = [image["image"] for image in facts["predictions"]]
    assert main([*line, "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "effect.json").read_text())
    assert [image["image"] for image in again["predictions"]] == images
    assert main([*line, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other = json.loads((tmp_path / "other" / "effect.json").read_text())
    assert [image["image"] for image in other["predictions"]] != images


def test_inference_steps_are_both_timestep_and_evaluations(stores, bridge, tmp_path):
    line = ["test", str(stores / "test"), "--bridge", str(bridge), "--num-test-images", "2"]
    assert main([*line, "--out", str(tmp_path / "a"), "--inference-steps", "900"]) == 0
    assert main([*line, "--out", str(tmp_path / "b"), "--inference-steps", "1"]) == 0
    strong, weak = (json.loads((tmp_path / n / "effect.json").read_text())["moved_cosine"]["mean"] for n in "ab")
    assert strong < weak
    assert main([*line, "--out", str(tmp_path / "c"), "--inference-steps", "1001"]) == 2
    assert main([*line, "--out", str(tmp_path / "c"), "--num-test-images", "0"]) == 2


def test_a_bridge_of_another_run_is_refused_or_forced(stores, bridge, tmp_path, capsys):
    from ezhoi_diffusion import DiffusionBridge

    other = DiffusionBridge.from_pretrained(bridge)
    other.provenance["fingerprint"]["weights"] = "0" * 64
    other.save_pretrained(tmp_path / "other")
    line = ["compare", str(stores / "test"), "--bridge", str(tmp_path / "other"), "--bridges", "none,diffusion"]
    assert main(line) == 2
    assert "weights is" in capsys.readouterr().err
    assert main([*line, "--force"]) == 0
    assert "FORCED: bridge 'diffusion' was made for another EZ-HOI run: weights is" in capsys.readouterr().out


def test_a_comparison_on_training_images_says_so(stores, capsys):
    assert main(["compare", str(stores / "train"), "--bridges", "none,identity"]) == 0
    assert "no result to report" in capsys.readouterr().out


# The verdict, on made-up pairs: two texts, three pairs


def effect(after: torch.Tensor, logits_after: torch.Tensor, labels: torch.Tensor) -> Effect:
    return Effect(
        before=torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 1]]),
        after=after,
        text=torch.tensor([[2.0, 0, 0], [0, 3, 0]]),
        logits_before=torch.tensor([[1.0, 0, 9], [0, 1, 9], [1, 0, 9]]),
        logits_after=logits_after,
        possible=torch.tensor([[True, True, False]] * 3),
        labels=labels,
    )


def comparison(before: float, after: float) -> Comparison:
    variants = {name: VariantResult(name, torch.tensor([ap / 100])) for name, ap in (("none", before), ("b", after))}
    return Comparison(variants, {"full": torch.tensor([0])}, 3, 3, torch.tensor([1]), {})


def test_effect_counts_what_changed():
    logits = torch.tensor([[0.0, 1, 9], [0, 1, 9], [0, 1, 9]])
    labels = torch.tensor([[False, True, False], [False, False, False], [True, False, False]])
    found = effect(torch.eye(3)[:, [0, 1, 2]] * 10, logits, labels)
    before, after = found.top()
    assert (before.tolist(), after.tolist()) == ([0, 1, 0], [1, 1, 1])
    assert found.outcome() == {"unchanged": 1, "changed": 2, "to right": 1, "to wrong": 1, "other": 0}
    assert found.accuracy() == (0.5, 0.5)
    similarity = found.similarity()
    torch.testing.assert_close(similarity[0], torch.tensor([0.5**0.5, 1, 0.5**0.5]))
    torch.testing.assert_close(similarity[1], torch.tensor([1.0, 1, 0]))
    words = verdict(found, comparison(10, 10), "b")
    assert "right for 50.0% before, 50.0% after" in words
    assert "norms changed by a factor of" in words


@pytest.mark.parametrize(("gain", "warns"), [(-1.0, True), (0.0, True), (2.0, False)])
def test_the_verdict_warns_where_similarity_rose_and_map_did_not(gain, warns):
    nearer = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    nothing_known = torch.zeros(3, 3, dtype=torch.bool)
    found = effect(nearer, torch.zeros(3, 3), nothing_known)
    words = verdict(found, comparison(10, 10 + gain), "b")
    assert ("WARNING: similarity rose and mAP did not" in words) == warns
    assert "accuracy is unknown" in words
