"""Whether bridges help: train several miniature EZ-HOIs, and compare every bridge on each of them.

    python -m ezhoi_diffusion.demo.study --out DIR

A run is one world (a seed) in one zero-shot split. The splits of a seed share their world. Each run trains, captures, fits,
tunes and compares with the commands that a user runs. Run it again to resume, or to redo only what changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from ezhoi_diffusion.demo.run_demo import MINIATURE, SCRIPT, free_port
from ezhoi_diffusion.demo.study_table import read_run, summarize, write_tables
from ezhoi_diffusion.demo.vocabulary import UNSEEN
from ezhoi_diffusion.demo.world import ezhoi_args
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import check_writable
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.pipeline.record import FILE as PIPELINE
from ezhoi_diffusion.pipeline.record import Record, Step

# Name in the table -> flags of `ezhoi-diffusion train`, and the name that `compare` knows the result by.
BRIDGES: dict[str, tuple[tuple[str, ...], str]] = {
    "gentle": (("--recipe", "gentle"), "diffusion"),
    "paired": (("--recipe", "paired"), "diffusion"),
    "scored": (("--recipe", "scored"), "diffusion"),
    **{
        name: (("--bridge", name), name) for name in ("residual", "interactive", "compete", "eszsl", "gaussian_classes")
    },
    "eszsl_permuted": (("--bridge", "eszsl", "--set", "permute_texts=true"), "eszsl"),  # a control
}
# `mean_shift` takes its means from the first bridge
CONTROLS = ("identity", "mean_shift", "scale", "prior_only", "random_move")
FOLDS = "3"  # of `tune`: five take four times as long
TRAINING, TRAIN_FEATURES, TEST_FEATURES = "training", "train-features", "test-features"
TUNED, COMPARISON = "tuned", "comparison"
SEEDS, SPLITS = (3, 4, 5), ("unseen_verb", "rare_first", "unseen_object")
WORLD_CODE = """\
import json, pathlib, sys
from ezhoi_diffusion.demo.world import make_world
make_world(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))"""


class StudyError(EzhoiDiffusionError):
    """A step of the study failed; the message shows its command and the end of its output."""


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Attributes:
        n_train: Training images of a world.
        n_test: Test images of a world.
        steps: Pretraining steps of a world's towers and detector.
        epochs: Of the miniature's training.
    """

    n_train: int
    n_test: int
    steps: tuple[int, int]
    epochs: int


FULL_SIZE, QUICK = Size(1200, 1000, (220, 260), 5), Size(60, 40, (40, 200), 1)


@dataclass
class Progress:
    """Print each finished step, and an estimate of the time left: mean seconds of that kind of step, over the workers."""

    waiting: Counter[str]
    jobs: int
    total: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.total = self.waiting.total()

    def done(self, run: str, kind: str, seconds: float | None) -> None:
        """Count a step; `seconds` is None if it was done before."""
        with self.lock:
            self.waiting[kind] -= 1
            if seconds is not None:
                self.seconds[kind].append(seconds)
            number = self.total - self.waiting.total()
            took = "done before" if seconds is None else f"{seconds:.0f} s"
            print(f"[{number}/{self.total}] {run} {kind}: {took}{self._left()}", flush=True)

    def _left(self) -> str:
        known = [s for times in self.seconds.values() for s in times]
        if not known or not self.waiting.total():
            return ""
        means = {kind: sum(times) / len(times) for kind, times in self.seconds.items()}
        other = sum(known) / len(known)
        left = sum(count * means.get(kind, other) for kind, count in self.waiting.items()) / self.jobs
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"


@dataclass(frozen=True)
class Study:
    """What to run, and where."""

    out: Path
    seeds: Sequence[int]
    splits: Sequence[str]
    bridges: Mapping[str, tuple[tuple[str, ...], str]]
    size: Size

    def runs(self) -> list[tuple[int, str]]:
        """Every seed in every split."""
        return [(seed, split) for seed in self.seeds for split in self.splits]

    def kinds(self) -> list[str]:
        """Steps of a run, in order."""
        return [TRAINING, TRAIN_FEATURES, TEST_FEATURES, *self.bridges, TUNED, COMPARISON]

    def folder(self, seed: int, split: str) -> Path:
        """Everything of one run."""
        return self.out / f"seed-{seed}" / split


def run_study(study: Study, jobs: int) -> None:
    """Run what is not done yet, `jobs` steps at a time, and write study.json and study.md.

    Raises:
        StudyError: A step failed. Runs that do not need it were finished first.
        PipelineError: A folder in `study.out` holds something else.
    """
    check_writable(study.out)
    runs = study.runs()
    progress = Progress(Counter({"world": len(study.seeds), **dict.fromkeys(study.kinds(), len(runs))}), jobs)
    with locked(study.out, StudyError), ThreadPoolExecutor(jobs) as pool:
        # Worlds come first in the queue: a run that waits for its world never keeps that world from being made.
        worlds = {seed: pool.submit(_make_world, study, seed, progress) for seed in study.seeds}
        futures = [pool.submit(_run, study, seed, split, worlds[seed], progress) for seed, split in runs]
    for future in futures:
        future.result()
    labels = {f"{loaded}={{run}}/{name}": name for name, (_, loaded) in study.bridges.items()}
    labels[f"{TUNED}={{run}}/{TUNED}"] = TUNED
    found = []
    for seed, split in runs:
        folder = study.folder(seed, split)
        names = {label.format(run=folder): name for label, name in labels.items()}
        found.append(read_run(folder / COMPARISON / "report.json", seed, split, names))
    write_tables(study.out, summarize(found))


def _make_world(study: Study, seed: int, progress: Progress) -> Path:
    folder = study.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    world = folder / "world"
    options = {"seed": seed, **{key: value for key, value in asdict(study.size).items() if key != "epochs"}}
    step = Step(
        "world", "", world, ["-c", WORLD_CODE, str(world), json.dumps(options)], {"options": json.dumps(options)}
    )
    _do(step, Record(folder), f"seed {seed}", progress)
    return world


def _run(study: Study, seed: int, split: str, world: Future[Path], progress: Progress) -> None:
    """All steps of one run, each after the one before."""
    folder = study.folder(seed, split)
    made = world.result()
    folder.mkdir(exist_ok=True)
    record = Record(folder)
    for step in _steps(study, folder, made, split):
        _do(step, record, f"seed {seed} {split}", progress)


def _steps(study: Study, folder: Path, world: Path, split: str) -> Iterator[Step]:
    """The steps of a run, in order; `command` has the words after `python`. A step may read what those before it wrote."""
    made = json.loads((world.parent / PIPELINE).read_text())["steps"]["world"]["output"]
    common = {"package": version("ezhoi-diffusion"), "split": split, "world": made}

    def step(name: str, words: Sequence[str], *after: str) -> Step:
        out = folder / name
        flags = [word.replace(str(study.out), "STUDY") for word in words]
        target = "--output-dir" if name == TRAINING else "--out"
        return Step(
            name, "", out, ["-m", "ezhoi_diffusion", *words, target, str(out)], {**common, "flags": flags}, after
        )

    script = str(MINIATURE / SCRIPT)
    flags = ezhoi_args(world, evaluate=False, zs_type=split)
    yield step(TRAINING, ["run", script, *flags, "--epochs", str(study.size.epochs)])
    checkpoint = max((folder / TRAINING).glob("ckpt_*.pt"))
    flags = [*ezhoi_args(world, evaluate=True, zs_type=split), "--resume", str(checkpoint)]
    for name, part in ((TRAIN_FEATURES, "train"), (TEST_FEATURES, "test")):
        yield step(name, ["capture", script, *flags, "--split", part], TRAINING)
    features, test = (str(folder / name) for name in (TRAIN_FEATURES, TEST_FEATURES))
    for name, (options, _) in study.bridges.items():
        yield step(name, ["train", features, *options], TRAIN_FEATURES)
    items = [f"{loaded}={folder / name}" for name, (_, loaded) in study.bridges.items()]
    first = str(folder / next(iter(study.bridges)))
    yield step(
        TUNED, ["tune", features, "--bridge", first, "--folds", FOLDS], TRAIN_FEATURES, next(iter(study.bridges))
    )
    named = ",".join(["none", *CONTROLS, *items, f"{TUNED}={folder / TUNED}"])
    yield step(
        COMPARISON, ["compare", test, "--bridges", named, "--bridge", first], TEST_FEATURES, *study.bridges, TUNED
    )


def _do(step: Step, record: Record, run: str, progress: Progress) -> None:
    """Do a step unless its result is there.

    Raises:
        StudyError: Its command failed.
    """
    if record.reason(step) is None:
        progress.done(run, step.name, None)
        return
    start = time.monotonic()
    record.begin(step, fresh=True)
    words = [*step.command, *(["--port", free_port()] if str(MINIATURE / SCRIPT) in step.command else [])]
    # One thread: more slow down matrices this small, and other runs have the other cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=MINIATURE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise StudyError(
            f"{run}, {step.name}: `python {shlex.join(words)}` failed with status {done.returncode}:\n{done.stdout[-3000:]}"
        )
    record.finish(step)
    progress.done(run, step.name, time.monotonic() - start)


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ezhoi_diffusion.demo.study",
        description="Train several miniature EZ-HOIs and compare every bridge on each. Writes study.md and study.json.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for all runs and the tables")
    add("--seeds", default=",".join(map(str, SEEDS)), metavar="N,…", help="worlds (%(default)s)")
    add("--splits", default=",".join(SPLITS), metavar="NAME,…", help="zero-shot splits of each world (%(default)s)")
    add("--bridges", default=",".join(BRIDGES), metavar="NAME,…", help="bridges (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="steps side by side (number of cores)")
    add("--quick", action="store_true", help="tiny worlds, to see that everything works: the figures mean nothing")
    args = parser.parse_args(words)
    names = args.bridges.split(",")
    splits = args.splits.split(",")
    for given, known in ((names, BRIDGES), (splits, UNSEEN)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    study = Study(
        args.out.resolve(), [int(seed) for seed in args.seeds.split(",")], splits,
        {name: BRIDGES[name] for name in names}, QUICK if args.quick else FULL_SIZE,
    )  # fmt: skip
    try:
        run_study(study, max(1, args.jobs))
    except EzhoiDiffusionError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    print((study.out / "study.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
