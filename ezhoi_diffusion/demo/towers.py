"""The networks of the miniature EZ-HOI that arrive pretrained: a detector and a CLIP-like pair of towers.

The towers are trained with InfoNCE at temperature 0.07 from two independent random initialisations, so the
modality gap between them is whatever contrastive training leaves, as in CLIP; nothing puts it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED_DIM = 64
TOKEN_DIM = 64
TEXT_LAYERS = 2
CONTEXT_LENGTH = 12
TEMPERATURE = 0.07
STRIDE = 4  # pixels of the detector's input per query


class Block(nn.Module):
    """Self-attention and MLP on [N, L, C].

    Written out because torch's own encoder layer switches to a fused kernel, with other roundings, depending
    on hooks and gradients: attaching a hook must not change a bit.
    """

    def __init__(self, dim: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        n, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-1, -2) / (dim // self.heads) ** 0.5).softmax(-1)
        x = x + self.dropout(self.out((weight @ v).transpose(1, 2).reshape(n, length, dim)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class PixelNorm(nn.LayerNorm):
    """Over the channels of every pixel of [B, C, H, W], so that nothing depends on the rest of the picture."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    return nn.Sequential(convolution, PixelNorm(outputs), nn.GELU())


class ImageEncoder(nn.Module):
    """Images [B, 1, H, W] -> one vector per image [B, D] and a map [B, D, H/4, W/4] in the same space."""

    output_dim = EMBED_DIM

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(_conv(1, 24, 5, 2), _conv(24, 48, 3, 2), _conv(48, 48, 3), _conv(48, 64, 3))
        self.proj = nn.Conv2d(64, EMBED_DIM, 1)

    def forward(self, images: Tensor, visual_prompt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """visual_prompt: [B, 64], added before the projection."""
        x = self.layers(images)
        if visual_prompt is not None:
            x = x + visual_prompt[..., None, None]
        local = self.proj(x)
        return local.mean((2, 3)), local


class TextEncoder(nn.Module):
    """Embedded sentences [N, L, C] -> features [N, D]; learned context vectors may join at every layer."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *words])}
        self.token_embedding = nn.Embedding(len(self.vocabulary), TOKEN_DIM)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(CONTEXT_LENGTH, TOKEN_DIM))
        self.transformer = nn.ModuleList(Block(TOKEN_DIM) for _ in range(TEXT_LAYERS))
        self.ln_final = nn.LayerNorm(TOKEN_DIM)
        self.text_projection = nn.Parameter(torch.randn(TOKEN_DIM, EMBED_DIM) * TOKEN_DIM**-0.5)

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """[N, CONTEXT_LENGTH] int64."""
        tokens = torch.zeros(len(sentences), CONTEXT_LENGTH, dtype=torch.int64)
        for row, sentence in zip(tokens, sentences, strict=True):
            ids = [self.vocabulary[word] for word in sentence.split()] + [1]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, prompts: Tensor, tokens: Tensor, contexts: Sequence[Tensor] | None = None) -> Tensor:
        """contexts: for every layer, [N, n_ctx, C]; read out at the end-of-text token."""
        x = prompts + self.positional_embedding
        for i, layer in enumerate(self.transformer):
            x = layer(x if contexts is None else torch.cat([x[:, :CONTEXT_LENGTH], contexts[i]], 1))
        end = (tokens == 1).int().argmax(1)
        features: Tensor = self.ln_final(x[torch.arange(len(x)), end]) @ self.text_projection
        return features

    def forward(
        self, prompts: Tensor, tokens: Tensor, contexts: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> the features [N, D], and those without context, which stay what pretraining made them."""
        with torch.no_grad():
            origin = self.encode(prompts, tokens)
        return self.encode(prompts, tokens, contexts), origin


class _BoxHead(nn.Module):
    """Queries [B, Q, C] -> boxes [B, Q, 4], cx cy w h in 0..1, relative to the centre of each query's cell."""

    references: Tensor

    def __init__(self, dim: int, height: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 4)
        centres = [(torch.arange(cells) + 0.5) / cells for cells in (height, width)]
        y, x = torch.meshgrid(*centres, indexing="ij")
        size = torch.full_like(x, 0.2)
        self.register_buffer("references", torch.stack([x, y, size, size], -1).view(-1, 4))

    def forward(self, queries: Tensor) -> Tensor:
        boxes: Tensor = torch.sigmoid(self.linear(queries) + torch.logit(self.references))
        return boxes


class Detector(nn.Module):
    """One query per 4x4 cell, each with class logits (the last is "nothing") and a box.

    As in EZ-HOI, the model calls the parts, never the whole.
    """

    def __init__(self, num_classes: int, height: int, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            _conv(1, 24, 5, 2), _conv(24, 48, 3, 2), _conv(48, 48, 3), _conv(48, 48, 3), nn.Flatten(2)
        )
        self.class_embed = nn.Linear(48, num_classes + 1)
        self.bbox_embed = _BoxHead(48, height // STRIDE, width // STRIDE)


def roi_pool(maps: Tensor, boxes: Tensor, points: int = 7) -> Tensor:
    """[B, D, h, w] and boxes [B, R, 4] xyxy in 0..1 -> [B, R, D, points, points], bilinear at bin centres."""
    steps = (torch.arange(points, device=maps.device) + 0.5) / points
    x = boxes[..., 0:1] + (boxes[..., 2:3] - boxes[..., 0:1]) * steps
    y = boxes[..., 1:2] + (boxes[..., 3:4] - boxes[..., 1:2]) * steps
    shape = (*boxes.shape[:2], points, points)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], -1) * 2 - 1
    out: Tensor = F.grid_sample(maps, grid.flatten(1, 2), align_corners=False)
    return out.view(*out.shape[:2], boxes.shape[1], points, points).transpose(1, 2)


@dataclass
class Corpus:
    """Scenes to pretrain on: S scenes, at most R regions each, padded with text -1 / class -1."""

    images: Tensor  # [S, 1, H, W] as the detector sees them
    clip_images: Tensor  # [S, 1, C, C] as the image tower sees them
    regions: Tensor  # [S, R, 4] xyxy in 0..1
    texts: Tensor  # [S, R] which sentence describes the region
    classes: Tensor  # [S, R] object class of the region; -1 for what is no single thing
    sentences: list[str]


def _optimizer(
    parameters: list[nn.Parameter], steps: int, lr: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)


def pretrain_towers(image: ImageEncoder, text: TextEncoder, corpus: Corpus, steps: int = 300, batch: int = 32) -> float:
    """InfoNCE between regions and their sentences; returns the last loss.

    Several regions of a batch may share a sentence: all of them are its positives.
    """
    optimizer, schedule = _optimizer([*image.parameters(), *text.parameters()], steps, 4e-3)
    tokens = text.tokenize(corpus.sentences)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(corpus.images), (batch,))
        labels = corpus.texts[rows]
        maps = image(corpus.clip_images[rows])[1]
        regions = roi_pool(maps, corpus.regions[rows], 4).mean((-1, -2))[labels >= 0]
        used, labels = labels[labels >= 0].unique(return_inverse=True)
        features = text.encode(text.token_embedding(tokens[used]), tokens[used])
        logits = F.normalize(regions, dim=-1) @ F.normalize(features, dim=-1).T / TEMPERATURE
        positive = F.one_hot(labels, len(used)).float()
        to_image = -(logits.log_softmax(0) * positive).sum(0) / positive.sum(0)
        loss = (F.cross_entropy(logits, labels) + to_image.mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def pretrain_detector(detector: Detector, corpus: Corpus, steps: int = 200, batch: int = 32) -> float:
    """Classify every cell by the box whose centre lies in or next to it, and regress that box."""
    optimizer, schedule = _optimizer(list(detector.parameters()), steps, 6e-3)
    nothing = detector.class_embed.out_features - 1
    weight = torch.ones(nothing + 1)
    weight[nothing] = 0.2
    centres = detector.bbox_embed.references[:, :2]
    near = 0.8 * STRIDE / torch.tensor([corpus.images.shape[-1], corpus.images.shape[-2]])
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(corpus.images), (batch,))
        boxes, classes = corpus.regions[rows], corpus.classes[rows]
        boxes = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
        inside = ((centres[None, :, None] - boxes[:, None, :, :2]).abs() < near).all(-1)  # [B, Q, R]
        inside &= (classes >= 0)[:, None]
        owner = inside.int().argmax(-1)
        target = torch.where(inside.any(-1), classes.gather(1, owner), nothing)
        queries = detector.backbone(corpus.images[rows]).transpose(1, 2)
        loss = 3 * F.cross_entropy(detector.class_embed(queries).transpose(1, 2), target, weight)
        wanted = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        found = target != nothing
        loss = loss + 10 * (detector.bbox_embed(queries)[found] - wanted[found]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()
