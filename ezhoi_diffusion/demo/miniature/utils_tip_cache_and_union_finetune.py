"""Data and engine of the miniature EZ-HOI: what EZ-HOI takes from pocket and hicodet, for a CPU.

Differs from the real EZ-HOI: images come from one safetensors file per split, there is no
mixed precision, and what is cached is JSON; the training augmentation is a random crop and brightness.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from hico_text_label import hico_unseen_index
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ezhoi_diffusion.demo import scenes, world
from ezhoi_diffusion.evaluation.average_precision import Scored, associate_pairs, average_precision


def custom_collate(batch):
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


class HICODet(Dataset):
    """Annotated images of one split; those without any pair are left out."""

    def __init__(self, root, anno_file):
        anno = json.loads(Path(anno_file).read_text())
        self.annotations = anno["annotation"]
        self.objects, self.verbs = anno["objects"], anno["verbs"]
        self.class_corr = [tuple(corr) for corr in anno["correspondence"]]
        self.num_object_cls, self.num_action_cls = len(self.objects), len(self.verbs)
        self.num_interation_cls = len(self.class_corr)  # spelled as upstream spells it
        self.interaction_to_verb = [verb for _, _, verb in self.class_corr]
        self.object_to_verb = self._by_object(2)
        self.object_to_interaction = self._by_object(0)
        lut = {(obj, verb): hoi for hoi, obj, verb in self.class_corr}
        self.object_n_verb_to_interaction = [
            [lut.get((obj, verb)) for verb in range(self.num_action_cls)] for obj in range(self.num_object_cls)
        ]
        self.anno_interaction = [0] * self.num_interation_cls
        self.anno_action = [0] * self.num_action_cls
        for image in self.annotations:
            for hoi in image["hoi"]:
                self.anno_interaction[hoi] += 1
                self.anno_action[self.interaction_to_verb[hoi]] += 1
        self._filenames, self._image_sizes = anno["filenames"], anno["size"]
        empty = set(anno["empty"])
        self._idx = [i for i in range(len(self._filenames)) if i not in empty]
        self._images = load_file(root)

    def _by_object(self, column):
        return [[corr[column] for corr in self.class_corr if corr[1] == obj] for obj in range(self.num_object_cls)]

    def filename(self, i):
        return self._filenames[self._idx[i]]

    def image_size(self, i):
        return self._image_sizes[self._idx[i]]

    def __len__(self):
        return len(self._idx)

    def __getitem__(self, i):
        anno, name = self.annotations[self._idx[i]], self.filename(i)
        target = {k: torch.tensor(v).view(-1, 4) for k, v in anno.items() if k.startswith("boxes")}
        target |= {k: torch.tensor(anno[k]) for k in ("hoi", "verb", "object")}
        return (self._images[name][None].float(), target), name


class VCOCO(Dataset):
    """As HICODet, but annotated with actions alone, and with objects counted from 1."""

    def __init__(self, root, anno_file):
        anno = json.loads(Path(anno_file).read_text())
        self.annotations, self.objects, self.actions = anno["annotations"], anno["objects"], anno["classes"]
        self.action_to_object, self._image_ids = anno["action_to_object"], anno["images"]
        self._keep = [i for i, image in enumerate(self.annotations) if image["actions"]]
        self._images = load_file(root)

    @property
    def object_to_action(self):
        every = enumerate(self.action_to_object)
        found = [(action, set(objects)) for action, objects in every]
        return {obj: [a for a, objects in found if obj in objects] for obj in range(1, len(self.objects))}

    def table_of(self, correspondence):
        table = [[None] * len(self.actions) for _ in self.objects]
        for hoi, obj, verb in correspondence:
            table[obj + 1][verb] = hoi
        return table

    def filename(self, i):
        return self.annotations[self._keep[i]]["file_name"]

    def image_id(self, i):
        return self._image_ids[self._keep[i]]

    def image_size(self, i):
        height, width = self._images[self.filename(i)].shape
        return width, height

    def __len__(self):
        return len(self._keep)

    def __getitem__(self, i):
        anno, name = self.annotations[self._keep[i]], self.filename(i)
        target = {k: torch.tensor(anno[k]).view(-1, 4) for k in ("boxes_h", "boxes_o")}
        target |= {k: torch.tensor(anno[k]) for k in ("actions", "objects")}
        return (self._images[name][None].float(), target), name


def keep_as_is(image, target):
    return image, target


def augment(image, target):
    """Random crop within the margin, and brightness."""
    dx, dy = torch.randint(-scenes.MARGIN, scenes.MARGIN + 1, (2,)).tolist()
    shift = torch.tensor([dx, dy, dx, dy])
    boxes = {k: v + shift for k, v in target.items() if k.startswith("boxes")}
    image = (image.roll((dy, dx), (1, 2)) * (0.7 + 0.6 * torch.rand(()))).clamp(max=255)
    return image, {**target, **boxes}


def resize_to_clip_input(image, target):
    h, w = image.shape[-2:]
    image = world.resize(image[None])[0]
    scale = torch.tensor([image.shape[-1] / w, image.shape[-2] / h]).repeat(2)
    return image, {**target, **{k: v * scale for k, v in target.items() if k.startswith("boxes")}}


class DataFactory(Dataset):
    """((image, image for CLIP), target) pairs, with boxes cxcywh relative to the image."""

    def __init__(
        self, name, partition, data_root, clip_model_name, zero_shot=False, zs_type="rare_first", num_classes=None
    ):
        if partition not in {"hicodet": world.PARTITIONS, "vcoco": ("trainval", "test")}.get(name, ()):
            raise ValueError(f"unknown dataset or partition: {name} {partition}")
        self.name, self.partition, self.clip_model_name = name, partition, clip_model_name
        root, stem = Path(data_root), partition if name == "hicodet" else f"vcoco_{partition}"
        kind = HICODet if name == "hicodet" else VCOCO
        self.dataset = kind(root / f"{stem}.safetensors", root / f"instances_{stem}.json")
        self.transforms = augment if partition.startswith("train") else keep_as_is
        self.clip_transforms = resize_to_clip_input
        self.keep = list(range(len(self.dataset)))
        self.zero_shot = zero_shot and partition == "train2015"
        if self.zero_shot:
            self.zs_type = zs_type
            self.filtered_hoi_idx = hico_unseen_index[zs_type]
            hidden = set(self.filtered_hoi_idx)
            hois = (self.dataset.annotations[i]["hoi"] for i in self.dataset._idx)
            self.keep = [i for i, hoi in enumerate(hois) if set(hoi) - hidden]
            self.zs_object_to_target = [
                [verb for hoi, o, verb in self.dataset.class_corr if o == obj and hoi not in hidden]
                for obj in range(self.dataset.num_object_cls)
            ]

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, i):
        (picture, annotated), name = self.dataset[self.keep[i]]
        if self.zero_shot:
            seen = ~torch.isin(annotated["hoi"], torch.tensor(self.filtered_hoi_idx, dtype=torch.int64))
            annotated = {k: v[seen] for k, v in annotated.items()}
        labels = annotated["verb" if self.name == "hicodet" else "actions"]
        if self.name == "vcoco":
            annotated["object"] = annotated.pop("objects")
        extra = {"orig_size": torch.tensor(picture.shape[-2:]), "labels": labels, "filename": name}
        picture, annotated = self.transforms(picture, annotated)
        clip_input, annotated = self.clip_transforms(picture, annotated)
        h, w = clip_input.shape[-2:]
        for key in ("boxes_h", "boxes_o"):
            x1, y1, x2, y2 = annotated[key].unbind(-1)
            centred = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
            annotated[key] = centred / torch.tensor([w, h, w, h])
        inputs = world.as_input(picture), world.as_input(clip_input)
        return inputs, {**annotated, **extra, "size": torch.tensor([h, w])}


def relocate(x):
    """Stands for pocket's relocate_to_cuda, which takes no strings: EZ-HOI's training fails on them."""
    if x is None or isinstance(x, torch.Tensor):
        return x
    if isinstance(x, (list, tuple)):
        return type(x)(relocate(item) for item in x)
    if isinstance(x, dict):
        return {k: relocate(v) for k, v in x.items()}
    raise TypeError(f"Unsupported type of data {type(x)}")


class CustomisedDLE:
    """The part of pocket's DistributedLearningEngine that EZ-HOI uses."""

    def __init__(
        self, net, dataloader, max_norm=0, num_classes=None, print_interval=100, find_unused_parameters=False,
        cache_dir="checkpoints",
    ):  # fmt: skip
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._train_loader, self._print_interval = dataloader, print_interval
        self._cache_dir = Path(cache_dir)
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        self.max_norm, self.num_classes = max_norm, num_classes
        self._state = SimpleNamespace(
            net=DistributedDataParallel(net, find_unused_parameters=find_unused_parameters),
            epoch=0, iteration=0, optimizer=None, lr_scheduler=None, inputs=None, targets=None, loss=None,
        )  # fmt: skip

    def update_state_key(self, **kwargs):
        vars(self._state).update(kwargs)

    def __call__(self, n):
        self.epochs = n
        for _ in range(n):
            self._on_start_epoch()
            for batch in self._train_loader:
                self._state.inputs, self._state.targets = batch[:-1], batch[-1]
                self._on_start_iteration()
                self._on_each_iteration()
                self._on_end_iteration()
            self._on_end_epoch()

    def _on_start_epoch(self):
        self._state.epoch += 1
        self._state.net.train()
        self._train_loader.sampler.set_epoch(self._state.epoch)
        self._losses, self._began = [], time.time()

    def _on_start_iteration(self):
        self._state.iteration += 1
        self._state.inputs = relocate(self._state.inputs)
        self._state.targets = relocate(self._state.targets)

    def _on_each_iteration(self):
        losses = self._state.net(*self._state.inputs, targets=self._state.targets)
        if losses["interaction_loss"].isnan():
            raise ValueError(f"the HOI loss is NaN on rank {self._rank}")
        self._state.loss = sum(losses.values())
        self._state.optimizer.zero_grad(set_to_none=True)
        self._state.loss.backward()
        if self.max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._state.net.parameters(), self.max_norm)
        self._state.optimizer.step()

    def _on_end_iteration(self):
        self._losses.append(self._state.loss.item())
        if self._rank == 0 and self._state.iteration % self._print_interval == 0:
            recent = self._losses[-self._print_interval :]
            print(
                f"Epoch [{self._state.epoch}/{self.epochs}], Iter. {self._state.iteration}, "
                f"Loss: {np.mean(recent):.4f}, Time: {time.time() - self._began:.1f}s"
            )

    def _on_end_epoch(self):
        if self._rank == 0:
            self.save_checkpoint()
        if self._state.lr_scheduler is not None:
            self._state.lr_scheduler.step()

    def save_checkpoint(self):
        state = self._state
        checkpoint = {
            "iteration": state.iteration,
            "epoch": state.epoch,
            "model_state_dict": state.net.module.state_dict(),
            "optim_state_dict": state.optimizer.state_dict(),
            "scaler_state_dict": {},
        }
        if state.lr_scheduler is not None:
            checkpoint["scheduler_state_dict"] = state.lr_scheduler.state_dict()
        torch.save(checkpoint, self._cache_dir / f"ckpt_{state.iteration:05d}_{state.epoch:02d}.pt")

    @torch.no_grad()
    def test_hico(self, dataloader, args=None):
        """-> AP of every interaction class."""
        net = self._state.net
        net.eval()
        dataset = dataloader.dataset.dataset
        conversion = torch.from_numpy(np.asarray(dataset.object_n_verb_to_interaction, dtype=float))
        found = [(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0))]
        for images, targets in dataloader:
            for output, target in zip(net(relocate(images), targets) or [], targets, strict=False):
                boxes_h, boxes_o = output["boxes"][output["pairing"]]
                scores = output["scores"]
                interactions = conversion[output["objects"], output["labels"]].long()
                gt_h = net.module.recover_boxes(target["boxes_h"], target["size"])
                gt_o = net.module.recover_boxes(target["boxes_o"], target["size"])
                labels = torch.zeros_like(scores)
                for hoi in target["hoi"].unique():
                    gt, det = target["hoi"] == hoi, interactions == hoi
                    if det.any():
                        labels[det] = associate_pairs(
                            (gt_h[gt], gt_o[gt]), (boxes_h[det], boxes_o[det]), scores[det], min_iou=0.5
                        ).to(labels)
                found.append((scores.cpu(), interactions.cpu(), labels.cpu()))
        scores, classes, labels = map(torch.cat, zip(*found, strict=True))
        return average_precision(Scored(scores, classes, labels, classes), dataset.anno_interaction)

    @torch.no_grad()
    def cache_hico(self, dataloader, cache_dir):
        """Write every detection of every image; the model is given no targets."""
        rows = []
        for i, output in self._outputs(dataloader, targets=False):
            columns = (output[key].tolist() for key in ("scores", "labels", "objects"))
            rows += [[i, *row] for row in zip(*columns, strict=True)]
        self._write(rows, cache_dir)

    @torch.no_grad()
    def cache_vcoco(self, dataloader, cache_dir):
        """Write every detection as V-COCO's own tool reads it, with boxes in pixels of the picture."""
        dataset, rows = dataloader.dataset.dataset, []
        for i, output in self._outputs(dataloader, targets=True):
            scale = torch.tensor(dataset.image_size(i)) / output["size"].flip(0)
            boxes = output["boxes"] * scale.repeat(2)
            columns = boxes[output["pairing"]].transpose(0, 1), output["scores"], output["labels"]
            for (human, other), score, label in zip(*(column.tolist() for column in columns), strict=True):
                action, role = dataset.actions[label].split()
                rows.append(
                    {
                        "image_id": dataset.image_id(i), "person_box": human, f"{action}_agent": score,
                        f"{action}_{role}": [*other, score],
                    }
                )  # fmt: skip
        self._write(rows, cache_dir)

    def _outputs(self, dataloader, targets):
        net = self._state.net
        net.eval()
        for i, (images, annotated) in enumerate(dataloader):
            yield from ((i, output) for output in net(relocate(images), annotated if targets else None) or [])

    def _write(self, rows, cache_dir):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        (Path(cache_dir) / "cache.json").write_text(json.dumps(rows))
