"""Measures of alignment against definitions written out in loops, and against cases done by hand."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from torch.nn.functional import normalize

from ezhoi_diffusion.evaluation.alignment import Alignment, disagreements
from ezhoi_diffusion.evaluation.effect import Effect
from ezhoi_diffusion.features.statistics import ModalityStatistics, mean_resultant_lengths

D, C, TEXTS = 16, 9, 31  # an odd number of pairs of texts: their median distance is one of them
COUNTED = ("recall_at_1", "recall_at_5", "top1")  # shares, which no order of summing changes


def texts(seed=0):
    """Text rows, and the text of each class."""
    source = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(TEXTS, D, generator=source), torch.randn(C, D, generator=source)


def pairs(n, seed=0, annotated=0.4):
    """Rows around a common vector, logits, annotations (of some pairs several) and possible targets."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D, generator=source) + torch.randn(D, generator=source) / 2
    labels = torch.rand(n, C, generator=source) < 0.3
    labels &= torch.rand(n, 1, generator=source) < annotated
    possible = torch.rand(n, C, generator=source) < 0.7
    possible[:, 0] = True
    return rows * 3, torch.randn(n, C, generator=source) * 2, labels, possible


def measured(columns, *, text=None, class_text=None, chunks=None):
    """The measures of whole columns, given in pieces of these sizes."""
    default_text, default_classes = texts()
    text = default_text if text is None else text
    class_text = default_classes if class_text is None else class_text
    n = len(columns[0])
    alignment = Alignment(text, class_text, normalize(text).mean(0), pairs=n)
    for piece in zip(*(column.split(chunks or [n]) for column in columns), strict=True):
        alignment.add(*piece)
    return alignment.measures()


# Every measure from its definition


def mmd_by_definition(x, y):
    distances = euclidean_distances(y)
    gamma = 1 / (2 * np.median(distances[np.triu_indices(len(y), 1)]) ** 2)
    total = 0.0
    for a in (x, y):
        kernel = rbf_kernel(a, gamma=gamma)
        n = len(a)
        total += sum(kernel[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return total - 2 * rbf_kernel(x, y, gamma=gamma).mean()


def by_definition(columns, text, class_text):
    rows, logits, labels, possible = (column.double().numpy() for column in columns)
    u, v, w = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (rows, text.double().numpy(), class_text.numpy()))
    centred = u - v.mean(0)
    own, first, fifth, right, predictions = [], [], [], [], []
    for i in range(len(u)):
        annotated = [c for c in range(C) if labels[i, c]]
        if not annotated:
            continue
        cosine = [float(u[i] @ w[c]) for c in range(C)]
        nearest = sorted(range(C), key=lambda c: -cosine[c])
        own.append(np.mean([cosine[c] for c in annotated]))
        first.append(nearest[0] in annotated)
        fifth.append(any(c in annotated for c in nearest[:5]))
        allowed = [c for c in range(C) if possible[i, c]]
        right.append(max(allowed, key=lambda c: logits[i, c]) in annotated)
        predictions += [(1 / (1 + np.exp(-logits[i, c])), labels[i, c]) for c in allowed]
    error = 0.0
    for b in range(15):
        inside = [(p, y) for p, y in predictions if b / 15 < p <= (b + 1) / 15]
        if inside:
            p, y = np.mean(inside, axis=0)
            error += len(inside) / len(predictions) * abs(p - y)
    return {
        "centroid_gap": np.linalg.norm(u.mean(0) - v.mean(0)),
        "mmd": mmd_by_definition(u, v),
        "cosine_to_own_text": np.mean(own),
        "recall_at_1": np.mean(first),
        "recall_at_5": np.mean(fifth),
        "top1": np.mean(right),
        "calibration_error": error,
        "mean_resultant_length": np.linalg.norm((centred / np.linalg.norm(centred, axis=1, keepdims=True)).mean(0)),
    }


@pytest.mark.parametrize("seed", range(10))
def test_measures_are_their_definitions(seed):
    text, class_text = texts(seed)
    columns = pairs(120, seed)
    found = measured(columns, text=text, class_text=class_text)
    assert found == pytest.approx(by_definition(columns, text, class_text), abs=1e-6)
    assert 0 < found["recall_at_1"] < found["recall_at_5"] < 1, "a case in which nothing is decided shows nothing"


@pytest.mark.parametrize("chunks", [[1] * 150, [0, 64, 0, 0, 85, 1, 0], [149, 1], [7, 143]])
def test_pieces_of_any_size_give_what_one_gives(chunks):
    columns = pairs(150)
    at_once, pieces = measured(columns), measured(columns, chunks=chunks)
    assert pieces == pytest.approx(at_once, rel=1e-9)
    assert [pieces[name] for name in COUNTED] == [at_once[name] for name in COUNTED]


def test_measures_agree_with_those_of_a_store_and_of_an_effect():
    text, _ = texts()
    rows, logits, labels, possible = pairs(80)
    found = measured((rows, logits, labels, possible))
    statistics = ModalityStatistics.compute([rows], text)
    assert found["centroid_gap"] == pytest.approx(statistics.gap, abs=1e-6)
    assert found["mean_resultant_length"] == pytest.approx(
        mean_resultant_lengths([rows], [statistics.text_mean])[0], abs=1e-6
    )
    effect = Effect(rows, rows, text, logits, -logits, possible, labels)
    reverse = measured((rows, -logits, labels, possible))
    assert (found["top1"], reverse["top1"]) == effect.accuracy()


def test_no_measure_but_those_of_the_score_sees_norms():
    rows, *others = pairs(60)
    stretched = rows * torch.linspace(0.01, 100, 60)[:, None]
    assert measured((stretched, *others)) == pytest.approx(measured((rows, *others)), rel=1e-5)


def test_features_equal_to_their_own_text_agree_with_it():
    _, class_text = texts()
    _, logits, _, possible = pairs(90)
    own = torch.arange(90) % C
    labels = torch.nn.functional.one_hot(own, C).bool()
    found = measured((class_text[own] * 7, logits, labels, possible))
    assert found["cosine_to_own_text"] == pytest.approx(1, abs=1e-6)
    assert found["recall_at_1"] == found["recall_at_5"] == 1
    opposite = measured((class_text[own] * -7, logits, labels, possible))
    assert opposite["cosine_to_own_text"] == pytest.approx(-1, abs=1e-6)
    assert opposite["recall_at_1"] == opposite["recall_at_5"] == 0


def test_ties_count_against_recall():
    """A row without direction is as near to every text: it has found nothing, however few texts are nearer."""
    _, logits, labels, possible = pairs(50, annotated=1)
    labels[:] = False
    labels[:, 3] = True
    found = measured((torch.zeros(50, D), logits, labels, possible))
    assert found["cosine_to_own_text"] == found["recall_at_1"] == found["recall_at_5"] == 0
    # one other class has the same text: first of two is no first, but is among five
    twice = torch.eye(D)[[0, 1, 2, 3, 3, 4, 5, 6, 7]]
    found = measured((torch.eye(D)[3].expand(50, D), logits, labels, possible), class_text=twice)
    assert (found["recall_at_1"], found["recall_at_5"]) == (0, 1)
    labels[:, 4] = True  # and where both are annotated, either will do
    found = measured((torch.eye(D)[3].expand(50, D), logits, labels, possible), class_text=twice)
    assert found["recall_at_1"] == 1


# MMD


def directions(n, shift, source):
    return torch.randn(n, D, generator=source) + shift * torch.eye(D)[0]


def test_mmd_of_one_distribution_has_mean_zero_and_grows_with_a_shift():
    source = torch.Generator().manual_seed(5)
    nothing = torch.zeros(40, C), torch.zeros(40, C, dtype=torch.bool), torch.ones(40, C, dtype=torch.bool)

    def draw(shift):
        return measured((directions(40, shift, source), *nothing), text=directions(TEXTS, 0.0, source))["mmd"]

    alike = torch.tensor([draw(0.0) for _ in range(300)], dtype=torch.float64)
    error = float(alike.std()) / len(alike) ** 0.5
    # leaving the diagonal in would add (1 − mean k) · (1/40 + 1/31), far outside
    assert abs(float(alike.mean())) < 3 * error < 0.003
    assert (alike < 0).any()
    shifted = [sum(draw(shift) for _ in range(20)) / 20 for shift in (0.0, 1.0, 2.0, 4.0)]
    assert all(near + 0.01 < far for near, far in pairwise(shifted)), shifted


def test_mmd_takes_the_same_rows_of_every_variant():
    """Turning texts and rows together changes no distance: what differs then would be the choice of rows."""
    columns = pairs(5000)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))[0]
    text, class_text = texts()
    whole = measured(columns)
    turned = measured(
        (columns[0] @ turn, *columns[1:]), text=text @ turn, class_text=class_text @ turn, chunks=[1700, 300, 3000]
    )
    assert turned["mmd"] == pytest.approx(whole["mmd"], abs=1e-6)
    # of a part of the rows: near the value of all, and not it
    full = mmd_of_all(columns[0], text)
    assert 0 < abs(whole["mmd"] - full) < 0.02 < full


def mmd_of_all(rows, text):
    u, v = normalize(rows.double()).numpy(), normalize(text.double()).numpy()
    gamma = 1 / (2 * np.median(euclidean_distances(v)[np.triu_indices(len(v), 1)]) ** 2)
    within = sum((rbf_kernel(a, gamma=gamma).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (u, v))
    return within - 2 * rbf_kernel(u, v, gamma=gamma).mean()


def test_a_variant_takes_the_same_memory_for_many_pairs():
    text, class_text = texts()

    def size(n):
        alignment = Alignment(text, class_text, normalize(text).mean(0), pairs=n)
        for part in zip(*(column.split(1000) for column in pairs(n)), strict=True):
            alignment.add(*part)
        return len(pickle.dumps(alignment))

    assert size(30_000) <= size(3_000) + 100 < 200_000


# Calibration; column 0 is annotated and impossible everywhere, so that every pair counts and the column does not


def calibration(logits, right):
    n = len(logits)
    labels = torch.cat([torch.ones(n, 1, dtype=torch.bool), right], 1)
    possible = torch.cat([torch.zeros(n, 1, dtype=torch.bool), torch.ones_like(right)], 1)
    columns = torch.zeros(n, D), torch.cat([torch.full((n, 1), 50.0), logits], 1), labels, possible
    return measured(columns, class_text=torch.eye(D)[: labels.shape[1]])["calibration_error"]


def test_calibration_error_of_calibrated_logits_tends_to_zero():
    source = torch.Generator().manual_seed(3)
    found = []
    for n in (30, 1_000, 100_000):
        logits = torch.randn(n, 4, generator=source) * 2
        found.append(calibration(logits, torch.rand(n, 4, generator=source) < logits.sigmoid()))
    assert found[0] > 3 * found[1] > 9 * found[2]
    assert found[2] < 0.003


@pytest.mark.parametrize(("announced", "true"), [(0.95, 0.6), (0.99, 0.5), (0.6, 0.9), (0.8, 0.8)])
def test_calibration_error_in_closed_form(announced, true):
    """Probabilities p and 1 − p, of which shares q and 1 − q are right: the error is |p − q|."""
    logit = torch.tensor(announced).logit()
    logits = torch.tensor([[1.0, -1.0]]).expand(1000, 2) * logit
    often = torch.arange(1000) < 1000 * true
    assert calibration(logits, torch.stack([often, ~often], 1)) == pytest.approx(abs(announced - true), abs=1e-6)


def test_calibration_error_has_fifteen_bins_of_one_width():
    """Two errors of opposite sign cancel in one bin, here 7/15 to 8/15, and add up in two."""
    right = torch.tensor([[True], [False]])
    assert calibration(torch.tensor([[0.47], [0.53]]).logit(), right) == pytest.approx(0, abs=1e-6)
    assert calibration(torch.tensor([[0.46], [0.54]]).logit(), right) == pytest.approx(0.54, abs=1e-6)
    ends = torch.tensor([[-torch.inf], [torch.inf]])
    assert calibration(ends, ~right) == 0
    assert calibration(ends, right) == 1


# Nothing to measure


def test_what_cannot_be_measured_is_none():
    rows, logits, labels, possible = pairs(20)
    unannotated = measured((rows, logits, torch.zeros_like(labels), possible))
    of_all_rows = {"centroid_gap", "mmd", "mean_resultant_length"}
    assert {name for name, value in unannotated.items() if value is not None} == of_all_rows
    full = measured((rows, logits, labels, possible))
    assert {name: unannotated[name] for name in of_all_rows} == {name: full[name] for name in of_all_rows}
    none = measured((rows[:0], logits[:0], labels[:0], possible[:0]))
    assert none.keys() == full.keys()
    assert set(none.values()) == {None}
    assert measured((rows, logits, labels, torch.zeros_like(possible)))["calibration_error"] is None
    alone = measured((rows, logits, labels, possible), text=torch.ones(1, D))
    assert alone["mmd"] is None
    assert alone["centroid_gap"] > 0


@pytest.mark.parametrize("announced", [19, 21])
def test_another_number_of_pairs_than_announced_is_refused(announced):
    text, class_text = texts()
    alignment = Alignment(text, class_text, normalize(text).mean(0), pairs=announced)
    alignment.add(*pairs(20))
    with pytest.raises(ValueError, match=f"{announced} pairs were announced, and 20 came"):
        alignment.measures()


# Where alignment and mean AP disagree

BASE = {
    "centroid_gap": 0.8,
    "mmd": 0.5,
    "cosine_to_own_text": 0.2,
    "recall_at_1": 0.3,
    "recall_at_5": 0.6,
    "top1": 0.4,
    "calibration_error": 0.1,
    "mean_resultant_length": 0.5,
}


def judged(mean_ap, **changes):
    return disagreements({"none": BASE, "b": {**BASE, **changes}}, {"none": 40.0, "b": mean_ap})


@pytest.mark.parametrize(
    ("name", "nearer", "farther"),
    [
        ("centroid_gap", 0.1, 0.9),
        ("mmd", 0.4, 0.6),
        ("cosine_to_own_text", 0.6, 0.1),
        ("recall_at_1", 0.4, 0.2),
        ("recall_at_5", 0.7, 0.5),
    ],
)
def test_each_measure_of_nearness_is_compared_with_mean_ap(name, nearer, farther):
    for mean_ap in (39.0, 40.0, 40.004):  # the last shows as no change
        (warning,) = judged(mean_ap, **{name: nearer})
        assert warning.startswith("WARNING: b is nearer to the texts than none")
        assert f"({name} {BASE[name]:.3f} -> {nearer:.3f})" in warning
        assert f"mAP did not rise (40.00 -> {mean_ap:.2f})" in warning
        assert "A smaller gap does not make a better detector: judge by mAP" in warning
        assert judged(mean_ap, **{name: farther}) == []
    (note,) = judged(41.0, **{name: farther})
    assert note.startswith("NOTE: b is farther from the texts than none")
    assert f"({name} {BASE[name]:.3f} -> {farther:.3f})" in note
    assert "mAP rose (40.00 -> 41.00)" in note
    assert judged(41.0, **{name: nearer}) == []


def test_what_says_nothing_of_nearness_or_hardly_changed_is_no_disagreement():
    assert judged(30.0, top1=0.9, calibration_error=0.0, mean_resultant_length=0.0) == []
    assert judged(30.0, centroid_gap=0.795, recall_at_1=0.305) == []
    assert judged(30.0, cosine_to_own_text=None) == []
    assert disagreements({}, {"none": 1.0}) == []


def test_one_sentence_for_each_variant():
    near = {**BASE, "centroid_gap": 0.1, "recall_at_1": 0.2}
    alignment = {"none": BASE, "a": near, "b": BASE, "c": near}
    mean_ap = {"none": 40.0, "a": 39.0, "b": 30.0, "c": 41.0}
    warning, note = disagreements(alignment, mean_ap)
    assert "WARNING: a is" in warning
    assert "recall" not in warning
    assert "NOTE: c is" in note
    assert "gap" not in note
    unknown = dict.fromkeys(BASE)
    assert disagreements({**alignment, "none": unknown}, mean_ap) == []
