"""What is known of a file of the guide, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.guide.reading import printable

MAX_INT = 1 << 63  # what a tensor holds, and a JSON reader of another language
FACTS = ("num_classes", "zs_type", "txt_align", "act_descriptor", "clip_model", "checkpoint", "text_mean_path")

Weights = Literal["ema", "online"]
TextSource = Literal["adapted", "raw_clip"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GuideFile:
    """A file of the guide.

    Attributes:
        dim: D, or 0 where the file does not tell.
        contents: Shapes and numbers, in one line.
        facts: What the file says of its making.
        warnings: What its user should know.
    """

    kind: ClassVar[str]
    path: Path
    dim: int
    contents: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class TextFile(GuideFile):
    """Text embeddings of the selected classes.

    Attributes:
        embeddings: [N_sel, D] float32.
        scale: None for raw embeddings x. Otherwise the embeddings are scale · normalize(normalize(x) − mean).
        padded: Written by the first version of the guide's script, with a row for each of the 600 classes.
    """

    kind = "text"
    embeddings: Tensor
    source: TextSource
    scale: float | None
    padded: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class TextMeanFile(GuideFile):
    """The mean [D] float32 of normalised text embeddings."""

    kind = "text mean"
    mean: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class VisualFile(GuideFile):
    """Visual embeddings, scale · normalize(normalize(x) − text mean): the norms of x are lost.

    Attributes:
        embeddings: [N, D] float32.
        images: N file names.
        objects: [N] object classes, where the file names them.
        uneven: Whether the norms differ. The guide's script writes one norm.
    """

    kind = "visual"
    embeddings: Tensor
    images: tuple[str, ...]
    objects: Tensor | None
    scale: float
    uneven: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class AnalysisFile(GuideFile):
    """`embeddings_for_viz`: embeddings before and after a bridge, for pictures. Only its text is of use."""

    kind = "analysis"
    text: TextFile


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelFile(GuideFile):
    """A checkpoint of the guide's trainer, or its weights alone.

    Attributes:
        step: As the file says, never as its name says.
        objective: None where the file has no schedule.
        num_timesteps: None where the file has no schedule.
        weights: The network's tensors, named as the network names them.
    """

    kind = "model"
    step: int | None
    init_dim: int
    dim_mults: tuple[int, ...]
    objective: Objective | None
    num_timesteps: int | None
    weights: dict[Weights, dict[str, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class EzHoiCheckpoint(GuideFile):
    """A checkpoint of EZ-HOI, which EZ-HOI's `--resume` takes. There is nothing to import."""

    kind = "EZ-HOI checkpoint"


def type_of(value: Any) -> str:
    """Type and shape of a value, for errors."""
    return f"{type(value).__name__} of shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def facts_of(value: Any, keys: tuple[str, ...] = FACTS) -> dict[str, Any]:
    """Contents of a file, as far as one line and JSON can hold them."""
    facts = {key: value.get(key) for key in keys} if isinstance(value, Mapping) else {}
    return {
        key: printable(fact) if isinstance(fact, str) else fact
        for key, fact in facts.items()
        if isinstance(fact, str) or (isinstance(fact, int) and abs(fact) < MAX_INT)
    }
