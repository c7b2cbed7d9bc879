"""Choose a chain of bridges and its settings by cross-validation on training images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
from ezhoi_diffusion.evaluation.chain import own_settings
from ezhoi_diffusion.evaluation.cost import estimate
from ezhoi_diffusion.evaluation.defaults import FOLDS, SEEDS
from ezhoi_diffusion.evaluation.drawing import draw_images
from ezhoi_diffusion.evaluation.folds import Folds, TuneError, seen_classes
from ezhoi_diffusion.evaluation.remake import NOT_CANDIDATES, ONLY_NAMED, Recipes, grid_of, recipes_of
from ezhoi_diffusion.evaluation.search import Choice, Lead, Space, choose, lead_of, search
from ezhoi_diffusion.evaluation.trials import Chain, Trial, Trials
from ezhoi_diffusion.evaluation.variants import Named, known_bridges, load_bridge, parse_bridges
from ezhoi_diffusion.features.score import EzHoiScore, require_replayable
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.scoring.bridge import ScoreBridge
from ezhoi_diffusion.training.fitted import known_fits

__all__ = [
    "TuneError",
    "Tuning",
    "candidates_of",
    "seen_classes",
    "tune",
]

SEARCH_REPLICATES = 200  # of the bootstrap of a trial; the estimate of what choosing gains has REPLICATES
CAVEAT = (
    "EZ-HOI itself was trained on these images and these classes. Scores here are higher than on a test split, for every row; the "
    "held-out part is new to the bridges alone."
)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The bridges that `tune` may choose from.

    Attributes:
        recipes: How each is made.
        bridges: Each made from all training images, seed 0.
        artifacts: What is stored of each, for every seed; None for a bridge that needs no files.
        items: What was named together, by positions; chains are built on these.
        grids: Setting -> values, for each.
        is_named: Whether the user named them. Others are left out where they cannot be made.
        left_out: Why a bridge that was not named is no candidate.
    """

    recipes: list[Recipes]
    bridges: list[Bridge]
    artifacts: list[list[Artifact | None]]
    items: list[tuple[int, ...]]
    grids: list[dict[str, list[Any]]]
    is_named: bool = True
    left_out: list[str] = field(default_factory=list)

    @property
    def space(self) -> Space:
        """What is searched: chains of bridges, and baselines by themselves."""
        baselines = [part for part, bridge in enumerate(self.bridges) if bridge.baseline]
        items = [item for item in self.items if not set(item) <= set(baselines)]
        own = [
            {key: getattr(bridge, key) for key in grid if isinstance(getattr(bridge, key, None), (int, float, str))}
            for bridge, grid in zip(self.bridges, self.grids, strict=True)
        ]
        names = [recipes.name for recipes in self.recipes]
        on_scores = [isinstance(bridge, ScoreBridge) for bridge in self.bridges]
        return Space(items, baselines, self.grids, own, names, on_scores)


@dataclass(frozen=True, eq=False)
class Tuning:
    """A choice and its evidence.

    Attributes:
        choice: What was chosen.
        trials: Every candidate by name.
        gain: Criterion, `seen` and `hidden` -> what choosing gains over `none` on images that took no part in it.
        chosen_by_fold: What each outer fold would have chosen.
        folds: The folds.
        captured: Number of images in the capture, from which those in the folds were drawn.
        forced: Fingerprint checks that were forced.
    """

    choice: Choice
    trials: dict[str, Trial]
    gain: dict[str, Lead]
    chosen_by_fold: list[str]
    folds: Folds
    captured: int
    forced: list[str]

    @property
    def images(self) -> int:
        """Number of images that took part in the choice."""
        return sum(map(len, self.folds.images))

    def caveats(self) -> list[str]:
        """What these figures do not say."""
        other = "" if not self.folds.classes else " The folds of verbs are the same in choosing and in this estimate."
        part = f"The choice was made on {self.images} of {self.captured} images, drawn at random from those with pairs."
        return [
            CAVEAT + other,
            *([part] if self.images < self.captured else []),
            *(f"FORCED: {message}" for message in self.forced),
        ]

    def evidence(self) -> dict[str, Any]:
        """The evidence, as JSON."""
        return {
            "images": self.images,
            "captured": self.captured,
            "folds": len(self.folds.images),
            "class_folds": len(self.folds.classes),
            "class_weight": self.folds.class_weight,
            "candidates": {name: _figures(trial) for name, trial in self.trials.items()},
            "best_bridge": self.choice.leader.name if self.choice.leader is not None else None,
            "best_baseline": self.choice.baseline.name,
            "lead_of_best_bridge": {name: asdict(lead) for name, lead in self.choice.leads.items()},
            "gain_of_choosing": {name: asdict(lead) for name, lead in self.gain.items()},
            "chosen_by_fold": self.chosen_by_fold,
            "caveats": self.caveats(),
        }


def _figures(trial: Trial) -> dict[str, float | None]:
    hidden = float(trial.hidden[0])
    return {
        "criterion": float(trial.value[0]),
        "seen": float(trial.seen[0]),
        "hidden": None if np.isnan(hidden) else hidden,
        "change": trial.change,
    }


@torch_defaults()
def candidates_of(
    store: FeatureStore,
    spec: str,
    plugins: PluginManager,
    *,
    folder: str = "",
    check: Callable[[Bridge, str], None],
    settings: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = SEEDS,
    device: torch.device | str = "cpu",
) -> Candidates:
    """Make every bridge once, from all training images.

    Args:
        store: A capture of the train split.
        spec: `NAME,NAME=DIR,NAME+NAME,…`. Empty: every bridge that can be made from a capture.
        plugins: The plugin manager.
        folder: DIR for names without one, where the bridge cannot be fitted.
        check: As for `resolve_variants`, for bridges in folders.
        settings: Applied to every bridge that has them.
        sweep: Values of settings to try, instead of each bridge's own grid.
        seeds: Number of seeds of a fit that has an option `seed`.
        device: Where the bridges go.

    Raises:
        TuneError: The store holds test images, there is no candidate, or no candidate has a setting.
        RemakeError: A named bridge cannot be made from a part of the features.
        EzhoiDiffusionError: A name is unknown or comes twice.
    """
    if store.split != "train":
        raise TuneError(
            f"{store.folder} holds the {store.split} split. What is chosen on test images cannot be tested on them: give the "
            f"capture of the train split"
        )
    known, fits = known_bridges(plugins), known_fits(plugins).names()
    named = parse_bridges(spec, known.names())
    found = Candidates([], [], [], [], [], is_named=bool(spec))
    at: dict[Named, int] = {}
    every = [[Named(name, "")] for name in known.names() if name not in (*NOT_CANDIDATES, *ONLY_NAMED)]
    for chain in named.values() if spec else every:
        item = []
        for one in chain:
            _ = known[one.name]
            given = Named(
                one.name, one.folder or ("" if one.name in fits or not _needs_folder(plugins, one.name) else folder)
            )
            if given not in at:
                try:
                    at[given] = _add(found, store, given, plugins, check, settings or {}, sweep, seeds, device)
                except EzhoiDiffusionError as error:
                    if spec:
                        raise
                    found.left_out.append(str(error))
                    continue
            item.append(at[given])
        if item:
            found.items.append(tuple(item))
    if not found.items:
        raise TuneError("there is no candidate beside none: name bridges with --bridges")
    for key in {*(settings or {}), *(sweep or {})}:
        if not any(own_settings(one.name, b, {key: None}) for one, b in zip(found.recipes, found.bridges, strict=True)):
            labels = ", ".join(one.label for one in found.recipes)
            raise TuneError(f"none of {labels} has a setting {key}: see `ezhoi-diffusion compare --help`")
    return found


def _needs_folder(plugins: PluginManager, name: str) -> bool:
    try:
        load_bridge(plugins, name, None)
    except EzhoiDiffusionError:
        return True
    return False


def _add(
    found: Candidates,
    store: FeatureStore,
    named: Named,
    plugins: PluginManager,
    check: Callable[[Bridge, str], None],
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]] | None,
    seeds: int,
    device: torch.device | str,
) -> int:
    recipes = recipes_of(named, plugins, settings, seeds, check)
    made = [recipes.make(store, plugins, seed) for seed in range(max(1, len(recipes.learn)))]
    bridge = made[0][0].to(device)
    found.recipes.append(recipes)
    found.bridges.append(bridge)
    found.artifacts.append([artifact for _, artifact in made])
    found.grids.append(grid_of(bridge, named.name, sweep))
    return len(found.recipes) - 1


@torch_defaults()
def tune(
    store: FeatureStore,
    candidates: Candidates,
    plugins: PluginManager,
    *,
    folds: int = FOLDS,
    num_images: int | None = None,
    device: torch.device | str = "cpu",
    jobs: int = 1,
    forced: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Tuning:
    """Choose among chains of the candidates, and estimate what choosing gains.

    Images are dealt into folds, and seen verbs too where the run hides classes. A bridge is made once for every part of the data
    that it may know. Its detections on all folds are scored together. The criterion is the mean AP of seen classes on images
    that the bridge was not made from, and of classes whose labels it did not know either, weighed by the shares of seen and
    unseen classes. The search is greedy (`search`), and the rule is `choose`.

    The estimate is that of an outer loop: for every fold of images, search and choice are repeated without it, and their choice
    is scored on it. The class folds are the same in both loops. So the estimate covers other images, not other classes.

    Args:
        store: A capture of the train split.
        candidates: What `candidates_of` returned.
        plugins: The plugin manager.
        folds: Number of folds.
        num_images: Choose on so many images, drawn at random; by default on all.
        device: Where the bridges get their features.
        jobs: Number of processes that fit and apply bridges.
        forced: Messages of fingerprint checks that were forced.
        say: Gets a line about the cost before the work begins.

    Raises:
        TuneError: There are too few images.
        ScoreError: EZ-HOI's logits cannot be computed from the features.
        RemakeError: A bridge cannot be made without one of the folds.
    """
    whole = store
    if num_images is not None and num_images < len(whole.images):
        store = whole.subset(draw_images(whole.images, num_images, 0))
    require_replayable(store, EzHoiScore.from_store(store))
    dealt = Folds.of_store(store, folds)
    trials = Trials(
        store,
        candidates.recipes,
        candidates.bridges,
        dealt,
        replicates=SEARCH_REPLICATES,
        plugins=plugins,
        device=device,
        jobs=jobs,
    )
    space = candidates.space
    most = sum(space.expected_trials())
    say(estimate(trials, space))
    left_out: set[str] = set()
    with tqdm(total=most * (1 + folds), desc="tune", unit="trial", file=sys.stderr) as progress:

        def searched(outer: int | None) -> dict[str, Trial]:
            def run(chains: Sequence[Chain]) -> list[Trial | None]:
                problems = trials.problems(chains, outer)
                for problem in filter(None, problems):
                    if candidates.is_named:
                        raise problem
                    left_out.add(str(problem))
                made = iter(
                    trials.run([chain for chain, no in zip(chains, problems, strict=True) if no is None], outer)
                )
                progress.update(len(chains))
                return [next(made) if no is None else None for no in problems]

            before = progress.n
            found = search(space, run)
            progress.update(most - (progress.n - before))
            return found

        found = searched(None)
        choices = [choose(searched(outer)).trial for outer in range(folds)]
    for reason in sorted(left_out):
        say(f"no candidate everywhere: {reason}")
    gain = gain_of_choices(trials, [choice.chain for choice in choices])
    return Tuning(choose(found), found, gain, [one.name for one in choices], dealt, len(whole.images), list(forced))


def gain_of_choices(trials: Trials, chains: Sequence[Chain]) -> dict[str, Lead]:
    """What the choices of the outer folds gain over `none`: the mean over folds of what each gains on its own.

    Folds are not ranked together, because scores of one chain mean little beside those of another (Forman & Scholz 2010,
    "Apples-to-apples in cross-validation studies"). Each is resampled with draws of its own.
    """

    def on_own_folds(chosen: Sequence[Chain]) -> NDArray[np.float64]:
        values = []
        for fold, chain in enumerate(chosen):
            seeds = [(chain, seed) for seed in range(trials.seeds(chain))]
            found = trials.figures(seeds, [fold], replicates=REPLICATES, seed=fold)
            values.append(np.mean([criterion for criterion, _ in found], axis=0))
        return np.asarray(np.mean(values, axis=0))

    tuned, none = on_own_folds(chains), on_own_folds([()] * len(chains))
    names = ("criterion", "seen", "hidden") if trials.folds.classes else ("criterion", "seen")
    return {name: lead_of(one, other) for name, one, other in zip(names, tuned, none, strict=False)}
