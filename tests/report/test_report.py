"""The report of a comparison: honest words, escaped names, one file, and a page that is right in a real browser."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from ezhoi_diffusion.diffusion.baselines import Identity
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.bootstrap import BootstrapResult, Difference
from ezhoi_diffusion.evaluation.changes import changes, discoveries
from ezhoi_diffusion.evaluation.comparison import Comparison, VariantResult
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.report.figures import MAPPED, pictures, png, render
from ezhoi_diffusion.report.headline import headline
from ezhoi_diffusion.report.write import write_report
from helpers.miniature import rows_of

GROUPS = ("full", "unseen", "seen", "rare", "non-rare")
EIGHT = {
    "identity": 0.0, "mean_shift": -1.0, "class_softmax": 0.4, "diffusion=runs/blend-0": 1.6, "diffusion=runs/blend-1": 1.4,
    "diffusion=runs/blend-2": 1.2, "gaussian": 0.1, "diffusion=runs/guide": -6.0,
}  # fmt: skip
SIXTY = {
    f"diffusion@start_timestep={level},blend={blend}": 1.5 - (37 * number % 60) / 14
    for number, (level, blend) in enumerate((a, b) for a in range(50, 550, 50) for b in (0.1, 0.2, 0.3, 0.5, 0.7, 1))
}


def make(effects: dict[str, float], *, classes: int = 600, half: float = 0.45) -> Comparison:
    """Variants whose classes move at random around an effect in points; intervals of `half` points on the full group."""
    g = torch.Generator().manual_seed(0)
    ap = {"none": torch.rand(classes, generator=g, dtype=torch.float64) * 0.7 + 0.15}
    moves = torch.rand(classes, generator=g) > 0.15
    for variant, effect in effects.items():
        noise = torch.randn(classes, generator=g, dtype=torch.float64) * 0.02
        ap[variant] = ap["none"] + (effect / 100 + noise) * moves * (effect != 0)
    every, hidden, few = torch.arange(classes), *(torch.rand(2, classes, generator=g) < 0.2)
    members = (every, every[hidden], every[~hidden], every[few], every[~few])
    annotations = 1 + (torch.rand(classes, generator=g) * 200).long()
    annotations[::50] = 0
    comparison = Comparison(
        {
            name: VariantResult(
                name,
                ap[name],
                added_ms=0.02 * 2 ** (number - 1) % 900 if number else 0.0,
                baseline=name.partition("=")[0] in ("identity", "mean_shift", "class_softmax"),
                provenance={"training": {"step": 5000}} if "diffusion" in name else None,
            )
            for number, name in enumerate(ap)
        },
        dict(zip(GROUPS, members, strict=True)),
        9658,
        150_000,
        annotations,
        {"backbone": "ViT-L-14-336px", "weights": "9f" * 32, "options": {"act_descriptor": True}},
        names=[f"a person riding animal {k}" for k in range(classes)],
        ezhoi_ms=187.4,
    )
    return with_intervals(comparison, half)


def with_intervals(comparison: Comparison, half: float) -> Comparison:
    """Intervals that are wider for fewer classes, and p-values times the number of variants."""
    bridges = comparison.bridges
    names = list(bridges)
    bases = ["none", *(name for name in names if bridges[name].baseline)]

    def width(group: str) -> float:
        return half * math.sqrt(len(comparison.groups["full"]) / len(comparison.groups[group]))

    def difference(variant: str, group: str, over: str) -> Difference:
        change = comparison.mean_ap(variant, group) - comparison.mean_ap(over, group)
        p = math.erfc(1.96 * abs(change) / width(group) / math.sqrt(2))
        around = width(group) if change else 0.0
        joint = 1.3 * around
        adjusted = min(1.0, p * (len(names) - 1))
        return Difference(change - around, change + around, p, adjusted, change - joint, change + joint, around / 1.96)

    def bootstrap(name: str) -> BootstrapResult:
        mean_ap = {
            g: (comparison.mean_ap(name, g) - width(g), comparison.mean_ap(name, g) + width(g))
            for g in comparison.groups
        }
        over = {base: {g: difference(name, g, base) for g in comparison.groups} for base in bases if base != name}
        if name == "none":
            return BootstrapResult({}, mean_ap, over)
        change = (bridges[name].ap - bridges["none"].ap) * 100
        bounds, p = torch.stack([change - 2, change + 2], 1), torch.special.erfc(1.96 * change.abs() / 2 / math.sqrt(2))
        bounds[comparison.annotations == 0], p[comparison.annotations == 0] = torch.nan, torch.nan
        return BootstrapResult({}, mean_ap, over, bounds, p)

    groups = comparison.seed_groups
    variants = {
        name: replace(result, bootstrap=None if result.seed_group in groups else bootstrap(name))
        for name, result in comparison.variants.items()
    }
    of_seeds = {name: bootstrap(name) for name in groups}
    return replace(comparison, variants=variants, seed_bootstrap=of_seeds, replicates=1000)


def changed(comparison: Comparison, name: str, **changes) -> None:
    """Replace something of one variant's result."""
    comparison.variants[name] = replace(comparison.variants[name], **changes)


def complete(effects: dict[str, float]) -> Comparison:
    """All that a comparison may hold."""
    comparison, g = make(effects), torch.Generator().manual_seed(1)
    measures = ("centroid_gap", "cosine_to_own_text", "recall_at_1", "calibration_error")
    for name in comparison.variants:
        changed(comparison, name, alignment=dict(zip(measures, torch.rand(4, generator=g).tolist(), strict=True)))
    changed(comparison, "none", alignment={**comparison.variants["none"].alignment, "recall_at_1": None})
    if effects is EIGHT:
        for name in comparison.variants:
            if "runs/blend" in name:
                changed(comparison, name, seed_group="diffusion=runs/blend")
        comparison = with_intervals(comparison, 0.45)
        comparison.headroom = {
            what: dict.fromkeys(GROUPS, 60.0 + number)
            for number, what in enumerate(("verbs", "interactiveness", "labels"))
        }
        comparison.calibration = {
            name: [
                {"object": f"animal {k}", "predictions": 90, "mean_score": 0.2, "annotated_rate": 0.1 + k / 100, "calibration_error": k / 50}
                for k in range(12)
            ]
            for name in comparison.variants
        }  # fmt: skip
    comparison.sample_text, features = torch.randn(40, 16, generator=g), torch.randn(60, 16, generator=g) + 2
    for number, name in enumerate(comparison.variants):
        changed(comparison, name, sample=features if effects.get(name, 0) == 0 else features - 0.1 * number)
    return comparison


def bare() -> Comparison:
    """A comparison of which nothing but AP is known."""
    variants = {
        "none": VariantResult("none", torch.tensor([0.3, 0.4])),
        "diffusion": VariantResult("diffusion", torch.tensor([0.31, 0.42]), added_ms=1.2),
    }
    return Comparison(variants, {"full": torch.arange(2)}, 3, 40, torch.tensor([5, 7]), {})


class Page(HTMLParser):
    """What a reader sees: tags with attributes, the text, and the rows of tables as lists of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "every tag is closed, in order"

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]

    def row(self, head: str) -> list[list[str]]:
        return [[cell.strip() for cell in row] for row in self.rows if row[0].strip() == head]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folders of the reports of eight variants, of sixty, and of one of which little is known."""
    folder = tmp_path_factory.mktemp("reports")
    write_report(complete(EIGHT), folder / "eight", ["WARNING: mean_shift is nearer, and mAP did not rise."])
    write_report(complete(SIXTY), folder / "sixty")
    write_report(bare(), folder / "bare")
    return folder


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# -- the files -------------------------------------------------------------------------------------------------


def test_the_folder_has_page_figures_and_pictures(reports):
    names = {"report.html", "report.json", "comparison.png", "forest.png", "per_class.png", "cost.png"}
    assert {path.name for path in (reports / "bare").iterdir()} == names
    for size in ("eight", "sixty"):
        assert {path.name for path in (reports / size).iterdir()} == {*names, "alignment.png", "embedding.png"}
        assert (reports / size / "report.html").stat().st_size < 1_000_000
    for path in reports.glob("*/*.png"):
        assert Image.open(path).convert("L").getextrema() != (255, 255), "something was drawn"


def test_the_json_has_all_that_the_page_says(reports):
    comparison, found = complete(EIGHT), read_json(reports / "eight" / "report.json", dict, EzhoiDiffusionError, "")
    said = headline(comparison)
    page = read(reports / "eight")
    for words in (found["headline"], *found["details"]):
        assert words.replace("-", "−") in page.text.replace("-", "−")
    best = found["seed_groups"]["diffusion=runs/blend"]["bootstrap"]["over"]["none"]["full"]
    assert best["joint_low"] < best["low"] < best["high"] < best["joint_high"]
    assert (found.pop("headline"), found.pop("details")) == (said.text, said.details)
    assert found == json.loads(json.dumps({**comparison.to_dict(), "notes": found["notes"]}))
    assert found["notes"] == ["WARNING: mean_shift is nearer, and mAP did not rise."]
    assert found["names"][3] == "a person riding animal 3"
    assert found["annotations"] == comparison.annotations.tolist()
    assert (found["algorithm"], found["setting"]) == ("11P", "default")
    variants = {variant["name"]: variant for variant in found["variants"]}
    bootstrap = variants["gaussian"]["bootstrap"]
    assert bootstrap["over"]["none"]["full"]["p_adjusted"] > 0.05
    assert bootstrap["per_class"][50] is None, "no annotation, no interval"
    assert variants["none"]["alignment"]["recall_at_1"] is None
    assert set(found["versions"]) == {"python", "torch", "ezhoi-diffusion"}
    seeds = torch.tensor(
        [variants[f"diffusion=runs/blend-{n}"]["mean_ap"]["full"] for n in range(3)], dtype=torch.float64
    )
    seed_group = found["seed_groups"]["diffusion=runs/blend"]["mean_ap"]["full"]
    assert seed_group["mean"] == pytest.approx(float(seeds.mean()))
    assert seed_group["standard_deviation"] == pytest.approx(
        math.sqrt(float((seeds - seeds.mean()).square().sum()) / 2)
    )


def test_the_same_comparison_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_report(complete({"diffusion": 1.0}), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_report_is_complete_without_its_pictures(tmp_path, mocker, capsys):
    mocker.patch("ezhoi_diffusion.report.figures.new_figure", side_effect=ValueError("no fonts"))
    (tmp_path / "forest.png").write_text("of an earlier report")
    write_report(bare(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}
    said = capsys.readouterr()
    assert "the report's pictures could not be drawn (ValueError: no fonts)" in said.err
    assert "pictures beside it" not in said.out


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qtagg", "nonsense", "svg"])
def test_the_backend_of_a_notebook_ends_no_drawing(tmp_path, backend):
    code = (
        "import os, sys; from pathlib import Path; from ezhoi_diffusion.report.png import new_figure, save_png\n"
        "figure = new_figure(); figure.subplots().plot([1, 2]); save_png(figure, Path(sys.argv[1]))\n"
        "import matplotlib; print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, chosen = done.stdout.split()
    assert kept == backend
    assert chosen == (backend if backend == "svg" else chosen)
    assert Image.open(tmp_path / "a.png").size


def test_a_report_that_is_interrupted_leaves_the_earlier_one_whole(tmp_path, mocker):
    write_report(make({"identity": 0.0}), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    mocker.patch("ezhoi_diffusion.report.page.page", side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(make({"identity": 1.0}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EzhoiDiffusionError, match="give another folder"):
        write_report(bare(), tmp_path / "file" / "report")


# -- the page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["eight", "sixty", "bare"])
def test_the_page_needs_nothing_else_and_is_accessible(reports, size):
    page = read(reports / size)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert not page.all("script")
    assert not page.all("link")
    assert not [attributes for _, attributes in page.tags if {"href", "srcset"} & set(attributes)]
    assert page.all("img")
    for image in page.all("img"):
        assert image["alt"].strip()
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        Image.open(BytesIO(base64.b64decode(data))).verify()
    assert not re.search(r"https?:|url\(|@import", (reports / size / "report.html").read_text())
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.all("th"))
    assert "default-src 'none'" in str(page.all("meta"))


def test_the_tables_have_every_variant_and_group(reports):
    comparison, page = complete(EIGHT), read(reports / "eight")
    for variant in comparison.ranked():
        result = comparison.bridges[variant]
        head = f"{variant} baseline" if result.baseline else variant
        absolute, differences, *_, alignment = page.row(head)
        for cell, group in zip(absolute[1:], GROUPS, strict=False):
            low, high = result.bootstrap.mean_ap[group]
            assert cell == f"{comparison.mean_ap(variant, group):.2f} {low:.2f} to {high:.2f}"
        for cell, group in zip(differences[1:], GROUPS, strict=True):
            found = result.bootstrap.difference[group]
            p = "<0.001" if found.p_adjusted < 0.001 else f"{found.p_adjusted:.3f}"
            figures = f"{comparison.difference(variant, group):+.2f} {found.low:+.2f} to {found.high:+.2f} p {p}"
            assert cell == figures.replace("-", "−")
        assert alignment[1] == f"{result.alignment['centroid_gap']:.3f}"
    assert page.row("none")[1][3] == "–", "what is not known"
    assert page.row("diffusion=runs/blend")[2][1] == "3"
    assert not page.row("diffusion=runs/blend-0"), "no seed stands for itself"
    many = read(reports / "sixty")
    assert all(len(many.row(variant)) == 3 for variant in SIXTY)


def test_single_classes_are_listed_by_change(reports):
    comparison = complete(EIGHT)
    best = comparison.ranked()[0]
    found = changes(comparison, best)
    assert len(found.classes) == 588, "only classes that are annotated"
    change = (comparison.bridges[best].ap - comparison.variants["none"].ap) * 100
    assert found.points.tolist() == sorted(change[comparison.annotations > 0].tolist(), reverse=True)
    counts = found.counts()
    moved = change[comparison.annotations > 0]
    certain = discoveries(comparison.bridges[best].bootstrap.per_class_p[comparison.annotations > 0], 0.05)
    assert counts == {
        "gains": int((moved > 1e-9).sum()), "losses": int((moved < -1e-9).sum()), "unchanged": int((moved.abs() < 1e-9).sum()),
        "certain gains": int((certain & (moved > 0)).sum()), "certain losses": int((certain & (moved < 0)).sum()),
    }  # fmt: skip
    assert not certain[(moved.abs() < 2)].any(), "a discovery is rarer than an interval without 0"
    assert min(counts.values()) > 0
    page = read(reports / "eight")
    assert f"{counts['gains']} gain, {counts['losses']} lose, {counts['unchanged']} unchanged" in page.text
    for at in (0, -1):
        row, index = page.row(f"a person riding animal {found.classes[at]}")[0], int(found.classes[at])
        before, after = (float(comparison.bridges[v].ap[index]) * 100 for v in ("none", best))
        low, high = found.points[at] - 2, found.points[at] + 2
        figures = f"{found.points[at]:+.2f} {low:+.2f} to {high:+.2f}".replace("-", "−")
        assert row[1:] == [figures, f"{before:.2f}", f"{after:.2f}", str(int(comparison.annotations[index]))]


def test_a_class_without_interval_is_listed_without_one(tmp_path):
    comparison = complete(EIGHT)
    best = comparison.ranked()[0]
    top = int(changes(comparison, best).classes[0])
    bootstrap = comparison.bridges[best].bootstrap
    bounds = bootstrap.per_class.clone()
    bounds[top] = torch.nan
    comparison.seed_bootstrap[best] = replace(bootstrap, per_class=bounds)
    write_report(comparison, tmp_path)
    page = read(tmp_path)
    assert re.fullmatch(r"\+\d+\.\d\d", page.row(f"a person riding animal {top}")[0][1])
    assert "nan" not in page.text


def test_what_is_not_known_is_left_out(reports):
    known, unknown = ({s["id"] for s in read(reports / size).all("section")} for size in ("eight", "bare"))
    assert unknown == {"map", "protocol", "classes", "cost", "provenance"}
    assert known == unknown | {"seeds", "headroom", "calibration", "alignment", "features"}
    page = read(reports / "bare")
    assert "says nothing about chance" in page.text
    assert "max-T" not in page.text
    assert "max-T" in read(reports / "eight").text
    assert "WARNING: mean_shift is nearer" in read(reports / "eight").text


def test_names_of_third_parties_are_inert(tmp_path):
    evil = "<script>alert(1)</script>"
    comparison = complete({f"{evil}&amp;$x^$": 1.0, 'mean_shift="><img src=x>': 0.5})
    comparison.names = [f"{evil} {k}" for k in range(600)]
    comparison.fingerprint = {evil: evil}
    for name in list(comparison.variants)[1:]:
        changed(comparison, name, seed_group=f"{evil}group", provenance={evil: {evil: [evil]}, "x": evil})
    comparison = with_intervals(comparison, 0.45)
    comparison.forced, comparison.degraded, comparison.caveats = [evil], {evil: evil}, [evil]
    for name in comparison.variants:
        changed(comparison, name, alignment={evil: 0.5})
    write_report(comparison, tmp_path, [evil])
    page = read(tmp_path)
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert page.row(f"{evil}group"), "shown as it is written"
    assert f"{evil}&amp;$x^$" in page.text
    assert len(re.findall(re.escape(evil), page.text)) > 20


def test_many_variants_get_room_and_few_get_pictures_of_their_own():
    eight, sixty = (pictures(complete(effects)) for effects in (EIGHT, SIXTY))
    assert sixty["forest"][0].height > 5 * eight["forest"][0].height
    for made in (eight, sixty):
        assert len(made["forest"]) == len(made["comparison"]) == len(GROUPS)
        assert len(made["per_class"]) == 3
        assert len(made["embedding"]) == 3, "bare EZ-HOI and two more"
        for panel in (panel for panels in made.values() for panel in panels):
            assert panel.alt
    width, height = render(sixty["forest"][0]).size
    assert height > 4 * width


def test_the_map_leaves_out_what_moves_nothing_and_takes_a_sample():
    comparison = complete({"identity": 0.0, "diffusion": 1.0})
    rows = torch.randn(MAPPED + 50, 16, generator=torch.Generator().manual_seed(2))
    for name in comparison.variants:
        changed(comparison, name, sample=rows + (name == "diffusion"))
    alts = [panel.alt for panel in pictures(comparison)["embedding"]]
    assert alts == [f"Map of {MAPPED} pairs of {name} among 40 texts." for name in ("none", "diffusion")]
    for name, result in comparison.variants.items():
        changed(comparison, name, sample=result.sample[:1])
    comparison.sample_text = comparison.sample_text[:2]
    assert "embedding" not in pictures(comparison)


def test_a_variant_that_is_far_off_does_not_make_dots_of_the_others():
    from matplotlib.figure import Figure

    def limits(effects):
        axes = Figure().subplots()
        pictures(make(effects))["forest"][0].draw(axes)
        return axes.get_xlim(), [text.get_text() for text in axes.texts]

    near = {"up": 1.0, "down": -1.0, "flat": 0.1, "identity": 0.0}
    (low, high), words = limits({**near, "mean_shift": -38.0})
    assert -4 < low < -1
    assert 1 < high < 4
    assert [word[:4] for word in words] == ["◂ -3"], "its figure stands at the edge"
    assert limits(near)[1] == []


def test_the_forest_plot_shows_which_intervals_contain_0():
    panels = pictures(make({"up": 3.0, "down": -3.0, "flat": 0.1, "identity": 0.0}))["forest"]
    assert "Intervals above 0: 1; below 0: 1; containing 0: 2." in panels[0].alt
    colors = {color for _, color in Image.open(BytesIO(png(render(panels[0])))).convert("RGB").getcolors(1 << 20)}
    assert {(0x0B, 0x7A, 0x5B), (0xC2, 0x41, 0x0C)} <= colors, "green above, orange below"


# -- the headline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effects", "tone", "words"),
    [
        ({"identity": 0, "diffusion": 2}, "gain", "gains 2.00 points of full mAP over bare EZ-HOI, and does better than the baseline identity."),
        ({"identity": 0, "mean_shift": 0.5, "diffusion": 2}, "gain", "and does better than every baseline: mean_shift, identity."),
        ({"mean_shift": 1.9, "diffusion": 2}, "unknown", "gains 2.00 points of full mAP over bare EZ-HOI, but cannot be told from mean_shift (baseline)."),
        ({"mean_shift=DIR": 4, "identity": 0, "diffusion": 2}, "unknown", "but does worse than mean_shift=DIR (baseline)."),
        ({"identity": 0, "diffusion": -2}, "loss", "diffusion loses 2.00 points of full mAP against bare EZ-HOI, and does worse than identity (baseline)."),
        ({"identity": 0, "diffusion": 0.1}, "unknown", "No gain can be told from chance: diffusion changes full mAP by +0.10 points, and cannot be told from identity (baseline). Excluded at 95 %: a loss larger than 0.48 and a gain larger than 0.69 points."),
        ({"diffusion": 2}, "unknown", "gains 2.00 points of full mAP over bare EZ-HOI. No baseline was compared, and one may do as much."),
        ({"diffusion": -2}, "loss", "No baseline was compared"),
        ({"identity": 0, "mean_shift": 3}, "unknown", "Only baselines were compared"),
    ],
)  # fmt: skip
def test_the_headline_is_honest_in_both_directions(effects, tone, words):
    found = headline(exact(effects))
    assert words in found.text
    assert found.tone == tone


def exact(effects: dict[str, float]) -> Comparison:
    """Every class moves by just the effect, so that words can be foreseen."""
    comparison = make(effects)
    for name in comparison.variants:
        ap = torch.full((600,), 0.3 + effects.get(name, 0.0) / 100, dtype=torch.float64)
        changed(comparison, name, ap=ap)
    return with_intervals(comparison, 0.45)


def test_a_gain_that_many_variants_explain_is_none():
    comparison = exact({"identity": 0.0, "diffusion": 0.7})
    assert headline(comparison).tone == "gain"
    differences = comparison.variants["diffusion"].bootstrap.over["none"]
    found = differences["full"]
    differences["full"] = replace(found, p_adjusted=0.2)
    assert found.low > 0
    assert "No gain can be told from chance" in headline(comparison).text


def test_a_sure_gain_counts_before_a_larger_one_by_chance():
    comparison = exact({"identity": 0.0, "sure": 2.0, "wild": 2.5})
    comparison.variants["wild"].bootstrap.over["none"]["full"] = Difference(-1.0, 6.0, 0.2, 0.3, -2.0, 7.0, 1.8)
    found = headline(comparison)
    assert found.text.startswith("sure gains 2.00 points")
    assert (
        "wild has the highest full mAP of 2 bridges, and is no sure gain over none and every baseline." in found.details
    )


def test_without_intervals_nothing_is_claimed():
    comparison = exact({"identity": 0.0, "diffusion": 5.0})
    for name in comparison.variants:
        changed(comparison, name, bootstrap=None)
    found = headline(replace(comparison, replicates=0))
    assert found.text == (
        "diffusion ends 5.00 points of full mAP above bare EZ-HOI. There are no intervals, and one run alone says nothing "
        "about chance."
    )
    assert found.tone == "unknown"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forced": ["made for another EZ-HOI run"]}, "FORCED: made for another EZ-HOI run"),
        ({"degraded": {"p": "plugin p raised"}}, "DEGRADED: plugin p raised"),
        ({"caveats": ["The first 20 images: no result to report."]}, "The first 20 images: no result to report."),
    ],
)
def test_what_is_forced_degraded_or_partial_is_no_gain(tmp_path, change, words):
    comparison = replace(exact({"identity": 0.0, "diffusion": 2.0}), **change)
    assert headline(comparison).tone == "unknown"
    assert headline(comparison).text.startswith("See the warnings first. diffusion gains")
    write_report(comparison, tmp_path)
    page = read(tmp_path)
    assert words in page.text
    assert page.text.index(words) < page.text.index("Mean AP"), "before any figure"
    assert words in comparison.table()


def seeds_of(shares: dict[str, float]) -> Comparison:
    """A training of several seeds, measured on 300 images with one annotation each: shares of images with a right pair."""
    images = 300
    draws = torch.Generator().manual_seed(0)
    detections = {}
    for name, share in {"none": 0.5, **shares}.items():
        found = torch.rand(images, generator=draws).argsort()[: int(share * images)]
        detections[name] = Scored(
            torch.rand(len(found), generator=draws).double(),
            torch.zeros_like(found),
            torch.ones(len(found)).double(),
            found,
        )
    variants = {name: Variant(name, Identity(), name.partition("/")[0] if "/" in name else None) for name in shares}
    for variant in variants.values():
        variant.bridge.baseline = False
    return Comparison.from_detections(
        detections, torch.ones(images, 1, dtype=torch.long), {"full": torch.tensor([0])}, variants, added_ms={},
        algorithm="AUC", replicates=300, pairs=images, fingerprint={},
    )  # fmt: skip


def test_a_training_whose_mean_seed_loses_has_no_gain_however_good_its_best_seed(tmp_path):
    comparison = seeds_of({"b/seed-0": 0.4, "b/seed-1": 0.35, "b/seed-2": 0.65})
    assert comparison.difference("b/seed-2", "full") > 14 > 0 > comparison.difference("b", "full")
    assert comparison.ranked() == ["b"]
    assert not comparison.is_significant("b/seed-2", "full")
    found = headline(comparison)
    assert found.text.startswith("No gain can be told from chance: b (mean of 3 seeds) changes full mAP by -")
    assert found.tone == "unknown"
    write_report(comparison, tmp_path)
    assert "seed-2" not in found.text + "".join(found.details) + comparison.table() + read(tmp_path).text
    report = read_json(tmp_path / "report.json", dict, EzhoiDiffusionError, "")
    assert report["variants"][3]["bootstrap"] is None
    assert report["seed_groups"]["b"]["bootstrap"]["over"]["none"]["full"]["high"] > 0


def test_every_seed_has_its_own_ap_whatever_the_order_and_given_counts_of_annotations_hold():
    found = torch.arange(20)
    one, two = (Scored(torch.rand(n).double(), torch.zeros(n).long(), torch.ones(n), found[:n]) for n in (5, 15))
    variants = {name: Variant(name, Identity(), "b") for name in ("b/0", "b/1")}
    for replicates in (0, 100):
        made = Comparison.from_detections(
            {"none": one, "b/1": two, "b/0": one}, torch.ones(20, 1).long(), {"full": torch.tensor([0])}, variants,
            added_ms={}, num_gt=torch.tensor([40]), algorithm="AUC", replicates=replicates, pairs=20, fingerprint={},
        )  # fmt: skip
        assert made.variants["b/0"].ap.tolist() == pytest.approx([4 / 40])
        assert made.variants["b/1"].ap.tolist() == pytest.approx([14 / 40])


def test_seeds_that_agree_gain_together():
    comparison = seeds_of({"b/seed-0": 0.8, "b/seed-1": 0.82, "b/seed-2": 0.81})
    assert headline(comparison).text.startswith("b (mean of 3 seeds) gains 30.89 points of full mAP over bare EZ-HOI")
    assert "Intervals cover the choice of images and training seeds (300 resamplings)." in comparison.table()


def test_the_primary_endpoint_is_tested_alone_and_the_headline_is_about_it():
    comparison = exact({"identity": 0.0, "tuned": 0.7, "diffusion": 2.0})
    over = comparison.variants["tuned"].bootstrap.over
    for base in over:
        over[base]["full"] = replace(over[base]["full"], p=0.01, p_adjusted=0.2)
        over[base]["seen"] = replace(over[base]["seen"], p=0.01, p_adjusted=0.2)
    assert comparison.is_significant("tuned", "full")
    assert not comparison.is_significant("tuned", "seen"), "other rows are adjusted"
    found = headline(comparison)
    assert found.text.startswith("tuned gains 0.70 points")
    assert found.tone == "gain"
    assert any("p (primary endpoint, not adjusted) 0.010" in line for line in found.details)
    assert "Its full mAP is the primary endpoint: that p is not adjusted." in comparison.table()


def test_a_sweep_has_simultaneous_intervals_and_a_caveat(tmp_path):
    comparison = exact({"identity": 0.0, "diffusion": 0.1, "diffusion[blend=0.5]": 0.5, "diffusion[blend=1]": 2.0})
    assert comparison.swept == ["diffusion[blend=0.5]", "diffusion[blend=1]"]
    found = comparison.found("diffusion[blend=0.5]", "full")
    assert found.low > 0 > found.joint_low
    assert comparison.bounds("diffusion[blend=0.5]", "full") == (found.joint_low, found.joint_high)
    assert not comparison.is_significant("diffusion[blend=0.5]", "full")
    comparison.caveats += comparison.sweep_caveat()
    assert headline(comparison).tone == "unknown"
    assert "the best of several is better here than on new images" in headline(comparison).text
    write_report(comparison, tmp_path)
    assert "simultaneous 95 % interval" in read(tmp_path).text
    assert exact({"diffusion": 2.0}).sweep_caveat() == []


def test_the_report_says_what_it_could_have_seen():
    comparison = exact({"identity": 0.0, "diffusion": 0.1})
    standard_error = 0.45 / 1.96
    line = next(line for line in headline(comparison).details if "80 % power" in line)
    assert (
        f"a test of diffusion alone finds a true change of {(1.959964 + 0.841621) * standard_error:.2f} points or more"
        in line
    )
    assert line.endswith("p is adjusted for all bridges here, which takes a larger one.")
    (line,) = (line for line in headline(exact({"diffusion": 0.1})).details if "80 % power" in line)
    assert "this comparison finds a true change of" in line
    assert "adjusted" not in line


def test_the_headline_has_the_mean_over_seeds():
    details = headline(complete(EIGHT)).details
    assert any(line.startswith("Over its 3 seeds, diffusion=runs/blend has ") for line in details)
    assert any(line.startswith("class_softmax: ") for line in details), "the best baseline's figures"


# -- the table in the terminal ---------------------------------------------------------------------------------


def test_the_table_says_what_is_known_of_chance():
    comparison = make(EIGHT)
    table = comparison.table()
    rows = rows_of(table)
    for variant in comparison.variants:
        assert rows[variant] == {group: f"{comparison.mean_ap(variant, group):.2f}" for group in GROUPS}
    lines = table.splitlines()
    for variant in EIGHT:
        groups = comparison.variants[variant].bootstrap.difference
        line = next(line for line in lines if line.startswith(f"{variant} - none "))
        found = re.findall(r"([+-]\d+\.\d\d) \[([+-]\d+\.\d\d) ([+-]\d+\.\d\d)\] p (<?\d\.\d{3})", line)
        assert len(found) == len(groups)
        for (change, low, high, p), (group, difference) in zip(found, groups.items(), strict=True):
            assert (change, low, high) == tuple(
                f"{x:+.2f}" for x in (comparison.difference(variant, group), difference.low, difference.high)
            )
            assert p == ("<0.001" if difference.p_adjusted < 0.001 else f"{difference.p_adjusted:.3f}")
    assert lines[-1] == "Intervals cover the choice of images, not the training seed (1000 resamplings)."
    assert "p is adjusted for all 8 bridges (max-T)." in lines
    assert bare().table().endswith("One run without intervals: small differences may be chance.")


# -- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, which logs its console and every request."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (390, 844), (1280, 800)])
@pytest.mark.parametrize("size", ["eight", "sixty", "bare"])
def test_the_page_in_a_browser(browser, reports, size, width, height, scheme):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("performance")  # which empties it
    address = (reports / size / "report.html").as_uri()
    browser.get(address)
    ask = browser.execute_script
    assert ask("return innerWidth") == width, "a page too wide is shown smaller on a phone"
    assert ask("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == [], "an error, or something that the policy refused"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert ask("return [...document.images].every(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 100)")
    for section in ("header", "main section", "h2", "figcaption", "aside"):
        boxes = ask(f"return [...document.querySelectorAll('{section}')].map(e => [e.clientWidth, e.clientHeight])")
        assert boxes
        assert all(wide > 100 and high > 10 for wide, high in boxes)
    assert ask("return parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    for element in ("body", ".headline", "figcaption", "td", "td small", "summary"):
        assert contrast(ask, element) >= 4.5, element


def contrast(ask, element: str) -> float:
    """The lowest contrast of any text in such elements to the page (WCAG 2.2, 1.4.3)."""
    paper = rgb(ask("return getComputedStyle(document.body).backgroundColor"))
    inks = ask(f"return [...document.querySelectorAll('{element}')].map(e => getComputedStyle(e).color)")
    return min((contrast_of(rgb(ink), paper) for ink in set(inks)), default=math.inf)


def rgb(color: str) -> list[float]:
    return [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]


def contrast_of(one: list[float], other: list[float]) -> float:
    def luminance(color: list[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
