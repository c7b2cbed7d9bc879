"""`--plugin capture --capture DIR`: write the features of a split into a feature store."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from ezhoi_diffusion.ezhoi.run import EzHoiRun
    from ezhoi_diffusion.features.batch import FeatureBatch
    from ezhoi_diffusion.features.writer import FeatureWriter


class CapturePlugin:
    """The part of a capture that one process makes."""

    def __init__(self) -> None:
        self._writer: FeatureWriter | None = None
        self._run: EzHoiRun | None = None
        self._text: Tensor | None = None

    @hookimpl
    def register_options(self, group: argparse._ArgumentGroup) -> None:
        """Add --capture."""
        group.add_argument(
            "--capture", default="", metavar="DIR",
            help="write adapter_feat, pairs, labels and text features of the split there, then end. Run the same command "
            "again to resume an interrupted capture",
        )  # fmt: skip

    @hookimpl
    def on_attach(self, run: EzHoiRun) -> None:
        """Open the store."""
        from ezhoi_diffusion.ezhoi.capture_pass import clip_folder, default_split, image_names, split_dataset
        from ezhoi_diffusion.ezhoi.tables import interaction_names
        from ezhoi_diffusion.features.store import FeatureStoreError, is_captured
        from ezhoi_diffusion.features.writer import FeatureWriter, clear_finished

        if not run.args.capture:
            raise FeatureStoreError("--plugin capture needs --capture DIR, the folder to write into")
        fingerprint = run.fingerprint.to_dict()
        split = run.args.capture_split or default_split(run.args)
        clip = clip_folder(run, split, image_names(split_dataset(run, split))[: run.args.max_images])
        meta = {
            "split": split,
            "max_images": run.args.max_images,
            "clip_img_file": clip and clip.name,  # the name tells the split; the path may differ when a capture resumes
            "processes": run.world_size,
            "package": version("ezhoi-diffusion"),
            "interactions": interaction_names(run),
            "fingerprint": fingerprint,
        }
        if is_captured(Path(run.args.capture), meta):
            if run.rank == 0:
                clear_finished(Path(run.args.capture))
                print(
                    f"capture: {run.args.capture} already holds this capture, finished. Delete the folder to capture again",
                    flush=True,
                )
            run.finished = True  # a run killed at the very end of its pass is started again
            return
        self._run, self._text = run, None
        self._writer = FeatureWriter(Path(run.args.capture), meta, rank=run.rank)
        run.images_done["capture"] = self._writer.next_index
        if self._writer.next_index and run.rank == 0:
            print(f"capture: {run.args.capture} is unfinished, resuming at image {self._writer.next_index}", flush=True)

    @hookimpl
    def on_train_batch(self, batch: FeatureBatch) -> None:
        """Append an image."""
        assert self._writer is not None
        if batch.text is not None:
            self._keep_text(batch.text)
        self._writer.add(batch)

    def _keep_text(self, text: Tensor) -> None:
        import torch

        from ezhoi_diffusion.ezhoi.fingerprint import context_vectors
        from ezhoi_diffusion.ezhoi.tables import score_tables
        from ezhoi_diffusion.features.store import FeatureStoreError

        assert self._writer is not None
        assert self._run is not None
        if self._text is not None:
            # `equal` first: it holds for almost every image and takes a sixth of the time
            if not torch.equal(self._text, text) and not torch.allclose(self._text, text, rtol=1e-4, atol=1e-5):
                raise FeatureStoreError(
                    "the text features differ between two images: with these flags the prompts depend on the image, so one set of "
                    "text features cannot stand for all. Capture with flags that share the prompts"
                )
            return
        self._text = text.clone()
        context = {f"context/{name}": vector for name, vector in context_vectors(self._run.model).items()}
        kept = self._writer.keep_ezhoi_tensors({**score_tables(self._run, text), **context})
        stored = kept.get("text", text[:0])  # from before an interruption, or from another process
        if stored.shape != text.shape or not torch.allclose(stored, text.cpu(), rtol=1e-4, atol=1e-5):
            raise FeatureStoreError(
                f"{self._writer.folder} has other text features than this run: capture into a new folder"
            )

    @hookimpl
    def on_detach(self, run: EzHoiRun) -> None:
        """Close the store; rank 0 does so after all others."""
        from ezhoi_diffusion.features.writer import finish_store

        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.flush()  # whole images, however the run ended
            if run.rank == 0 and not run.failed:
                store = finish_store(writer.folder)
                print(f"captured {len(store)} pairs of {len(store.images)} images into {store.folder}", flush=True)
        finally:
            writer.close()


plugin = CapturePlugin()
