"""Wrong values under right checksums, one at a time, in every kind of file that this package writes.

Each value of each JSON file becomes null, a text, -1, 2**70, 1e308, [], {}, true, or goes; each tensor goes, or gets another
shape, dtype or value. A reader then refuses the file by its name, or the value is one that no result depends on. It never
ends in a traceback, and never takes a gigabyte or a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.demo.study_table import read_run
from ezhoi_diffusion.doctor.bridge import check_training
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.chain import Member, save_chain
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import Variant, load_bridge
from ezhoi_diffusion.features.batch import FeatureBatch
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import pair_labels, seen_pairs
from ezhoi_diffusion.features.score import NEEDED, EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store
from ezhoi_diffusion.files import write_json
from ezhoi_diffusion.hub import build_upload
from ezhoi_diffusion.pipeline.record import Record, Step
from ezhoi_diffusion.report.hub_card import model_card, read_report
from ezhoi_diffusion.testing import synthetic_store, with_full_rank_texts
from ezhoi_diffusion.training.fitted import fit_artifact, known_fits
from helpers.packages import with_packages
from helpers.resealed import Case, content, json_cases, outcome, tensor_cases
from helpers.trainings import weights

QUICK = 30  # cases of each kind; all of them with EVERY_RESEALED_CASE=1 in the environment
FITTED = ("residual", "mean_shift", "eszsl", "gaussian_classes", "interactive", "compete", "pseudo", "test_time_cache")
WHEREVER = (("boxes", "below"), ("gt_boxes", "below"), ("labels", "below"))
PACKAGES = ("center", "softmax", "procrustes", "standardize")


@dataclass
class Kind:
    """A folder as it is written, the files in it to change, and who reads them."""

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    reseal: Callable[[Path, str], None]


def facts(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def reseal_store(folder: Path, file: str) -> None:
    index = content(folder / "index.json")
    if file == "meta.json":
        index["meta"] = content(folder / file)
    elif file == "ezhoi.safetensors":
        index["ezhoi"] = facts(folder / file)
    elif file.startswith("shard"):
        index["shards"] = [{**s, **facts(folder / file)} if s["file"] == file else s for s in index["shards"]]
    elif file == "index.json":
        if isinstance(index.get("meta"), dict):
            write_json(folder / "meta.json", index["meta"])
        return
    write_json(folder / "index.json", index)


def reseal_capture(folder: Path, file: str) -> None:
    path = folder / file
    if path.suffix == ".safetensors":
        write_json(path.with_suffix(".json"), {**content(path.with_suffix(".json")), **facts(path)})


def reseal_artifact(folder: Path, file: str) -> None:
    path = folder / file
    if path.suffix == ".safetensors":
        config = content(path.parent / "config.json")
        config["files"][path.name] = facts(path)
        write_json(path.parent / "config.json", config)


def reseal_checkpoint(folder: Path, file: str) -> None:
    path = folder / file
    if path.suffix == ".safetensors":
        manifest = content(path.parent / "manifest.json")
        manifest["files"][path.stem] = facts(path)
        write_json(path.parent / "manifest.json", manifest)


def keep(folder: Path, file: str) -> None:
    """A file that no other one knows."""


def read_store(folder: Path) -> Any:
    store = FeatureStore(folder)
    learned, seen, score = pair_labels(store)[:], seen_pairs(store, held_out=None), replay(store, {})
    return (
        [
            store.adapter_feat(),
            learned.target,
            learned.valid,
            learned.prior,
            seen.target,
            store.statistics().visual_mean,
        ],
        score.to_dict()["variants"][0]["mean_ap"],
        store.split,
    )


META: dict[str, Any] = {}


def read_capture(folder: Path) -> Any:
    writer = FeatureWriter(folder, META)
    try:
        writer.keep_ezhoi_tensors({})
        writer.flush()
        return next(finish_store(folder).shards())["adapter_feat"], FeatureStore(folder).text
    finally:
        writer.close()


def reads_bridge(plugins: Any, name: str, images: list[Any]) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        bridge = load_bridge(plugins, name, folder)
        variant = Variant(name, bridge)
        found = [variant.apply(image.adapter_feat, image.pairs) for image in images]
        if not name.startswith(("chain", "tuned")):
            model_card(folder, None)
        build_upload(folder, "user/name", card="")
        return found

    return read


class Found(EzhoiDiffusionError):
    """What the doctor says of a file."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    top = tmp_path_factory.mktemp("kinds")
    plain = synthetic_store(top / "plain", images=12, pairs_per_image=4, alter=None)
    store_folder = top / "store"
    # the texts of full rank that the score needs
    ezhoi = with_full_rank_texts(plain).ezhoi
    score = EzHoiScore(**{name: ezhoi[name] for name in NEEDED})
    META.clear()
    META.update({key: value for key, value in plain.meta.items() if key != "schema"})

    def written(folder: Path, *, finished: bool) -> None:
        writer = FeatureWriter(folder, META, rows_per_shard=12)
        writer.keep_ezhoi_tensors(ezhoi)
        for index, image in enumerate(stored_images(plain)):
            writer.add(FeatureBatch(
                index, image.pairs, image.adapter_feat, None, score.logits(image.adapter_feat), image.labels,
                image.gt_boxes.transpose(0, 1), image.gt_hoi,
            ))  # fmt: skip
        writer.flush()
        if finished:
            finish_store(folder)
        writer.close()

    written(store_folder, finished=True)
    written(top / "captured", finished=False)
    store = FeatureStore(store_folder)
    patch = pytest.MonkeyPatch()
    plugins = with_packages(patch, *PACKAGES)
    shard = "shard-000-00000"
    found = {
        "store": Kind(store_folder, ("meta.json", "index.json", "ezhoi.safetensors", f"{shard}.safetensors"), read_store, reseal_store),
        "capture": Kind(top / "captured", ("meta.json", "ezhoi.json", "ezhoi.safetensors", f"{shard}.json", f"{shard}.safetensors"), read_capture, reseal_capture),
    }  # fmt: skip
    images = [image for image in stored_images(store) if len(image.pairs)][:3]
    artifacts = {}
    options = {"residual": {"epochs": 1}}
    for name in (*FITTED, *PACKAGES):
        folder = top / name
        fit = known_fits(plugins)[name]
        if split_of(fit) == "test":
            artifacts[name] = fit(store)
        else:
            artifacts[name] = fit_artifact(name, fit, store, options.get(name, {}))
        artifacts[name].save(folder)
        files = ("config.json", *sorted(artifacts[name].files))
        found[name] = Kind(folder, files, reads_bridge(plugins, name, images), reseal_artifact)
    members = [Member("residual", artifacts["residual"], {"blend": 0.5}), Member("scale", None, {"factor": 2.0})]
    save_chain(top / "chain", members, provenance={"fingerprint": store.fingerprint})
    found["chain"] = Kind(top / "chain", ("config.json", "1-residual/config.json", "1-residual/residual.safetensors"), reads_bridge(plugins, "chain", images), reseal_artifact)  # fmt: skip
    chosen = {"chosen": {"name": "residual", "helps": True, "why": "it helps"}, "evidence": {"images": 3}}
    save_chain(top / "tuned", members, kind="tuned", config=chosen, provenance={"fingerprint": store.fingerprint})
    found["tuned"] = Kind(top / "tuned", ("config.json", "1-residual/config.json"), reads_bridge(plugins, "tuned", images), reseal_artifact)  # fmt: skip

    flags = ["--batch-size", "8", "--val-every", "3", "--checkpoint-every", "3", "--denoiser-options", '{"width": 16, "depth": 1}', "--seeds", "1"]  # fmt: skip
    trained = top / "diffusion"
    assert main(["train", str(store_folder), "--out", str(trained), "--train-steps", "6", *flags]) == 0
    clean = top / "clean"
    shutil.copytree(trained, clean, ignore=shutil.ignore_patterns("checkpoints", "training*"))
    found["diffusion"] = Kind(clean, ("config.json", "model.safetensors", "statistics.safetensors", "context.safetensors"), reads_bridge(plugins, "diffusion", images), reseal_artifact)  # fmt: skip
    newest = sorted((trained / "checkpoints").iterdir())[-1].name
    for other in sorted((trained / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(other)

    def resume(folder: Path) -> Any:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(io.StringIO()) as said:
            warnings.simplefilter("always")
            status = main(["train", str(store_folder), "--out", str(folder), "--train-steps", "7", "--resume", *flags])
        if status:
            raise Found(f"{said.getvalue()} {[str(one.message) for one in warned]}")
        return sorted(weights(folder).items())

    files = ("manifest.json", *(f"{name}.safetensors" for name in ("model", "ema", "optimizer")))
    found["checkpoint"] = Kind(trained, tuple(f"checkpoints/{newest}/{file}" for file in files), resume, reseal_checkpoint)  # fmt: skip
    bridge = load_bridge(plugins, "diffusion", trained)

    def examine(folder: Path) -> Any:
        findings = list(check_training(bridge, folder))
        for finding in findings:
            if finding.name == "bridge.history":
                raise Found(finding.found)
        return [(finding.name, finding.level, finding.found) for finding in findings]

    found["training.json"] = Kind(trained, ("training.json",), examine, keep)

    record = top / "record"
    (record / "made").mkdir(parents=True)
    (record / "made" / "file").write_text("made")
    step = Step("one", "", record / "made", ["train"], {"a": 1, "b": {"c": [1, 2]}})
    after = Step("two", "", record / "later", ["train"], {"a": 2}, ["one"])
    log = Record.__new__(Record)
    log._out, log._path, log._steps = record, record / "pipeline.json", {}
    log.begin(step, fresh=False)
    log.finish(step)
    log._steps["one"]["kept"] = {"inputs": {"a": 1}, "output": "0" * 64, "files": ["file"]}
    log.begin(after, fresh=False)

    def go_on(folder: Path) -> Any:
        one = Step("one", "", folder / "made", ["train"], {"a": 1, "b": {"c": [1, 2]}})
        two = Step("two", "", folder / "later", ["train"], {"a": 2}, ["one"])
        opened = Record(folder)
        return [opened.reason(one), opened.reason(two), opened.inputs(two)]

    found["pipeline.json"] = Kind(record, ("pipeline.json",), go_on, keep)

    report = top / "report"
    report.mkdir()
    variants = {n: Variant(n, load_bridge(plugins, n, top / n)) for n in ("mean_shift", "residual")}
    write_json(report / "report.json", replay(store, variants, replicates=20, measured=True).to_dict())
    names: dict[str, str] = {}
    found["report.json"] = Kind(
        report,
        ("report.json",),
        lambda folder: [model_card(top / "residual", read_report(folder)), read_run(folder / "report.json", 0, "rare_first", names)],
        keep,
    )  # fmt: skip
    yield found
    patch.undo()


def cases_of(name: str, kind: Kind) -> list[Case]:
    found = []
    for file in kind.files:
        make = tensor_cases if file.endswith(".safetensors") else json_cases
        found += make(name, kind.folder, file, kind.reseal)
    return found


NAMES = [
    "store", "capture", *FITTED, *PACKAGES, "chain", "tuned", "diffusion", "checkpoint", "training.json", "pipeline.json",
    "report.json",
]  # fmt: skip


def is_legitimate(case: Case) -> bool:
    """Whether the other value is as good as the one that was there: it may change the result."""
    what, _, change = case.what.partition(" ")
    if case.file.endswith(".safetensors"):  # a weight may be anything, and a box anywhere
        return change in ("below", "above") if case.kind != "store" else (what, change) in WHEREVER
    if case.kind == "pipeline.json":  # a step may depend on anything, and be done or not
        return any(part in what for part in (".inputs.", ".files.", ".output"))
    if case.kind == "training.json":
        return what.endswith("loss")
    if case.kind in ("chain", "tuned"):  # a member has more settings, or another number in one
        return ".settings." in what
    return case.kind == "report.json" and change in ("-1", "a text", "true")  # points of mAP, names, a baseline


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_is_refused_or_means_nothing(kinds, tmp_path, name):
    kind, counts, wrong = kinds[name], Counter[str](), []
    target = tmp_path / kind.folder.name
    shutil.copytree(kind.folder, target)
    right = kind.read(target)
    cases = cases_of(name, kind)
    for case in (
        cases
        if "EVERY_RESEALED_CASE" in os.environ
        else cases[:: len(cases) // (QUICK if name != "checkpoint" else QUICK // 3)]
    ):
        shutil.rmtree(target)
        shutil.copytree(kind.folder, target)
        case.write(target)
        said = outcome(kind.read, target, case.file, right)
        counts[said.partition(":")[0]] += 1
        if said not in ("refused", "same") and not (said.startswith("accepted") and is_legitimate(case)):
            wrong.append(f"{case.file} {case.what}: {said}")
    print(f"{name}: {sum(counts.values())} of {len(cases)} cases: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
