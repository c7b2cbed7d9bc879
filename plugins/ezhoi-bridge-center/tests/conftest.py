"""A made-up capture, which has annotated pairs of unseen classes too, and the plugin as it is installed."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch

from ezhoi_diffusion import FeatureStore
from ezhoi_diffusion.testing import synthetic_store

NAME = "center"


class Relabelled(FeatureStore):
    """A capture, had its annotations been matched in another way."""

    def __init__(self, store, relabel):
        super().__init__(store.folder)
        self.host, self.relabel = store.ezhoi, relabel

    def shards(self):
        for shard in super().shards():
            yield {**shard, "labels": self.relabel(shard)}


@pytest.fixture(scope="session")
def independent():
    """independent(store): with texts as a text encoder gives them; those that are made up lie in few dimensions."""

    def changed(store):
        draw = torch.Generator().manual_seed(0)
        other = FeatureStore(store.folder)
        other.ezhoi["text"] = store.text + 0.1 * torch.randn(store.text.shape, generator=draw)
        return other

    return changed


@pytest.fixture(scope="session")
def store(tmp_path_factory, independent):
    return independent(synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80))


@pytest.fixture(scope="session")
def relabelled(store):
    """relabelled(function): the capture with what the function makes of a shard in the place of its labels."""
    return lambda relabel: Relabelled(store, relabel)


@pytest.fixture(scope="session")
def load():
    """The registered loader."""
    (point,) = (point for point in entry_points(group="ezhoi_diffusion") if point.name == NAME)
    loaders = {}
    point.load().register_bridges(loaders.__setitem__, None)
    return loaders[NAME]


@pytest.fixture(scope="session")
def equal():
    """equal(a, b): whether two artefacts are the same to the last bit."""

    def same(a, b):
        tensors = [{(f, n): t for f, part in x.files.items() for n, t in part.items()} for x in (a, b)]
        return (
            (a.bridge, a.config, a.provenance) == (b.bridge, b.config, b.provenance)
            and tensors[0].keys() == tensors[1].keys()
            and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
        )

    return same


@pytest.fixture
def reloaded(tmp_path, load):
    """reloaded(artifact): the bridge, after it was saved and loaded."""

    def through(artifact):
        artifact.save(tmp_path / "bridge")
        return load(tmp_path / "bridge")

    return through
