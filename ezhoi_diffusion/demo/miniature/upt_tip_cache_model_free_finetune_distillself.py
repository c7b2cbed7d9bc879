"""The model of the miniature EZ-HOI: same modules, same order, same shapes, same score as the real `UPT`.

Differs from the real EZ-HOI: the detector and the towers are those of `ezhoi_diffusion.demo.towers`, the visual
prompt is one vector per image, `vis_fuse` starts near the sum of both features, unseen classes borrow no
prompts, and only `--logits_type HO` exists.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hico_text_label import HOI_IDX_TO_ACT_IDX, hico_text_label, hico_unseen_index
from safetensors.torch import load_file
from torch import nn

from ezhoi_diffusion.demo import towers, world
from ezhoi_diffusion.evaluation.average_precision import box_iou


class Adapter(nn.Module):
    """Residual bottleneck with self-attention over dim 0 of [L, N, D]; the identity when new."""

    def __init__(self, input_size, down_size=64, dropout=0.1):
        super().__init__()
        self.down_proj_mem = nn.Linear(input_size, down_size)
        self.mhsa_layers = towers.Block(down_size, heads=2, dropout=dropout)
        self.up_proj_mem = nn.Linear(down_size, input_size)
        nn.init.zeros_(self.up_proj_mem.weight)
        nn.init.zeros_(self.up_proj_mem.bias)

    def forward(self, x):
        hidden = self.mhsa_layers(F.relu(self.down_proj_mem(x)).transpose(0, 1)).transpose(0, 1)
        return x + self.up_proj_mem(hidden)


class DescriptorAdapter(nn.Module):
    """Residual attention of every text feature [1, N_sel, D] to its own three descriptions; the identity when new."""

    def __init__(self, dim):
        super().__init__()
        self.up_proj_mem = nn.Linear(dim, dim)
        nn.init.zeros_(self.up_proj_mem.weight)
        nn.init.zeros_(self.up_proj_mem.bias)

    def forward(self, x, prior):
        descriptions = prior[0]  # [N_sel, 3, D]
        weight = (descriptions @ x[0][:, :, None]).softmax(1)
        return x + self.up_proj_mem((weight * descriptions).sum(1))[None]


class MultiModalPromptLearner(nn.Module):
    """Context vectors for both towers."""

    def __init__(self, args, classnames, text_encoder, feature_dim):
        super().__init__()
        # A plain list, as upstream: neither trained nor saved, and another RNG state gives other vectors.
        self.txtcls_ctx_pt = [
            nn.Parameter(torch.randn(args.N_CTX, towers.TOKEN_DIM)) for _ in range(towers.TEXT_LAYERS)
        ]
        self.txtcls_pt_adapter = Adapter(towers.TOKEN_DIM, args.emb_dim)
        self.tokenized_prompts = text_encoder.tokenize(classnames)
        with torch.no_grad():
            prompts = text_encoder.token_embedding(self.tokenized_prompts)
        # N_sel differs between the two: one name for both would make the checkpoint unloadable.
        self.buffer = "token_prompts_eval" if args.eval and args.without_unseen_name else "token_prompts"
        self.register_buffer(self.buffer, prompts)
        self.img_clip_pt = args.img_clip_pt
        if self.img_clip_pt:
            self.clip_img_file = args.clip_img_file
            self.img_clip_pt_adapter = nn.Linear(feature_dim, feature_dim)
            nn.init.zeros_(self.img_clip_pt_adapter.weight)
            nn.init.zeros_(self.img_clip_pt_adapter.bias)

    def forward(self, filenames=None):
        """-> prompts [N_sel, L, C], contexts per layer [N_sel, n_ctx, C], visual prompt [B, D] or None."""
        prompts = getattr(self, self.buffer)
        contexts = [
            self.txtcls_pt_adapter(ctx.to(prompts.device)[:, None].expand(-1, len(prompts), -1)).transpose(0, 1)
            for ctx in self.txtcls_ctx_pt
        ]
        visual_prompt = None
        if self.img_clip_pt:
            folder = Path(self.clip_img_file)  # one file per image, as upstream, but no pickle
            prior = torch.stack(
                [load_file(folder / f"{Path(name).stem}_clip.safetensors")["feature"] for name in filenames]
            )
            visual_prompt = self.img_clip_pt_adapter(F.normalize(prior, dim=-1).to(prompts.device))
        return prompts, contexts, visual_prompt


class CustomCLIP(nn.Module):
    """The pretrained towers and the prompts."""

    def __init__(self, args, classnames, image_encoder, text_encoder):
        super().__init__()
        self.prompt_learner = MultiModalPromptLearner(args, classnames, text_encoder, image_encoder.output_dim)
        self.tokenized_prompts = self.prompt_learner.tokenized_prompts
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder


class PostProcess(nn.Module):
    """The detector's best queries of every image as scores, labels and boxes in pixels."""

    @torch.no_grad()
    def forward(self, outputs, sizes, queries=60, floor=0.05):
        # The floor is what lets an image have no person at all: a DETR has 100 queries, not one for every cell.
        results = []
        for logits, boxes, (h, w) in zip(outputs["pred_logits"], outputs["pred_boxes"], sizes, strict=True):
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)
            best = scores.argsort(descending=True)[:queries]
            best = best[scores[best] >= floor]
            boxes = to_corners(boxes[best]) * torch.stack([w, h, w, h])
            results.append({"scores": scores[best], "labels": labels[best], "boxes": boxes})
        return results


def to_corners(boxes):
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def batched_nms(boxes, scores, labels, threshold):
    """Rows to keep, best first; boxes of different classes do not suppress each other."""
    order = scores.argsort(descending=True)
    overlap = ((box_iou(boxes, boxes) > threshold) & (labels[:, None] == labels)).tolist()
    keep = []
    for i in order.tolist():
        if not any(overlap[i][k] for k in keep):
            keep.append(i)
    return torch.tensor(keep, dtype=torch.int64, device=boxes.device)


class UPT(nn.Module):
    """Zero-shot HOI detector: detected pairs, scored against text features of selected interactions."""

    def __init__(
        self, args, detector, postprocessor, model, human_idx, num_classes, object_class_to_target_class,
        object_n_verb_to_interaction, num_anno, select_HOI_index, act_descriptor_feat_select,
    ):  # fmt: skip
        super().__init__()
        if args.logits_type != "HO":
            raise ValueError("the miniature has --logits_type HO only")
        self.detector, self.postprocessor, self.clip_head = detector, postprocessor, model
        self.visual_output_dim = dim = model.image_encoder.output_dim
        self.human_idx, self.num_classes, self.num_anno = human_idx, num_classes, num_anno
        self.alpha, self.gamma = args.alpha, args.gamma
        self.box_score_thresh, self.fg_iou_thresh = args.box_score_thresh, args.fg_iou_thresh
        self.min_instances, self.max_instances = args.min_instances, args.max_instances
        self.object_class_to_target_class = object_class_to_target_class
        self.object_n_verb_to_interaction = np.asarray(object_n_verb_to_interaction, dtype=float)
        self.dataset, self.hyper_lambda, self.logits_type = args.dataset, args.hyper_lambda, args.logits_type
        self.img_align, self.txt_align, self.img_clip_pt = args.img_align, args.txt_align, args.img_clip_pt
        self.without_unseen_name, self.self_image_path = args.without_unseen_name, args.self_image_path
        self.zs_type = args.zs_type if args.zs else None
        self.filtered_hoi_idx = hico_unseen_index[args.zs_type] if args.zs else []
        self.select_HOI_index = select_HOI_index
        self.act_descriptor_feat_select = act_descriptor_feat_select

        self.vis_fuse = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        with torch.no_grad():  # near the sum of both features: eight seen verbs teach no map that generalises
            same = torch.eye(dim)
            self.vis_fuse[0].weight.mul_(0.3).add_(torch.cat([same, same], 1))
            self.vis_fuse[0].bias.fill_(0.2)  # lets most of a sum of unit rows through the ReLU
            self.vis_fuse[2].weight.mul_(0.3).add_(same)
        if self.img_align:
            self.mem_adapter = Adapter(dim, args.emb_dim)
        if self.txt_align:
            self.txtmem_adapter = Adapter(dim, args.emb_dim)
        if len(act_descriptor_feat_select):
            self.act_descriptor_attn = DescriptorAdapter(dim)
        self.featmap_dropout = nn.Dropout(0.2)
        self.logit_scale_HO = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # used as it is, not exponentiated
        verbs = torch.tensor([HOI_IDX_TO_ACT_IDX[hoi] for hoi in select_HOI_index])
        label = nn.Parameter(F.one_hot(verbs, num_classes).float(), requires_grad=False)
        if args.eval and self.without_unseen_name:
            self.label_HO_eval = label
        else:
            self.label_HO = label
        self.sample_lens_HO = label.detach().sum(0)
        self.sample_lens_HO[self.sample_lens_HO == 0] = 1e6  # verbs without a row, under --without_unseen_name

    def compute_prior_scores(self, x, y, scores, object_class):
        """-> [2, P, num_classes]: detection scores to the power p where the object has the verb, else 0."""
        power = 1.0 if self.training else self.hyper_lambda
        allowed = torch.zeros(len(x), self.num_classes, device=scores.device)
        for row, obj in zip(allowed, object_class[y].tolist(), strict=True):
            row[self.object_class_to_target_class[obj]] = 1
        return torch.stack([scores[rows].pow(power)[:, None] * allowed for rows in (x, y)])

    def compute_roi_embeddings(self, features, image_size, region_props, flag=0, hoitxt_features=None):
        """Logits of every pair of every image.

        `all_logits` has an entry only for images with pairs, the other lists one for every image.
        """
        device = features.device
        all_logits, priors, boxes_h, boxes_o, object_classes = [], [], [], [], []
        for local, size, props in zip(features, image_size, region_props, strict=True):
            boxes, scores, labels = props["boxes"], props["scores"], props["labels"]
            n, n_h = len(boxes), int((labels == self.human_idx).sum())
            if n_h == 0 or n < 2:
                none = torch.zeros(0, dtype=torch.int64, device=device)
                boxes_h.append(none)
                boxes_o.append(none)
                object_classes.append(none)
                priors.append(torch.zeros(2, 0, self.num_classes, device=device))
                continue
            # prepare_region_proposals puts humans first
            x, y = torch.nonzero(~torch.eye(n, dtype=torch.bool, device=device)[:n_h]).unbind(1)

            h, w = size
            pooled = towers.roi_pool(local[None], boxes[None] / torch.stack([w, h, w, h]))[0]
            single = F.normalize(self.featmap_dropout(pooled).flatten(2).mean(-1), dim=-1)
            adapter_feat = self.vis_fuse(torch.cat([single[x], single[y]], -1))
            if self.img_align:
                adapter_feat = self.mem_adapter(adapter_feat[:, None])[:, 0]
            text = hoitxt_features
            if self.txt_align:
                text = self.txtmem_adapter(text[None])[0]
            if len(self.act_descriptor_feat_select):
                descriptions, rows = self.act_descriptor_feat_select
                text = self.act_descriptor_attn(text[None], (descriptions[rows], None))[0]
            evaluated = self.without_unseen_name and not self.training
            label = self.label_HO_eval if evaluated else self.label_HO
            phi = (adapter_feat @ text.T) @ label / self.sample_lens_HO.to(device) / 2

            boxes_h.append(x)
            boxes_o.append(y)
            object_classes.append(labels[y])
            priors.append(self.compute_prior_scores(x, y, scores, labels))
            all_logits.append(phi * self.logit_scale_HO)
        glb_feat = features[-1].flatten(1).mean(-1)
        return all_logits, priors, boxes_h, boxes_o, object_classes, [], [], glb_feat

    def recover_boxes(self, boxes, size):
        h, w = size
        return to_corners(boxes) * torch.stack([w, h, w, h])

    def associate_with_ground_truth(self, boxes_h, boxes_o, targets):
        labels = torch.zeros(len(boxes_h), self.num_classes, device=boxes_h.device)
        overlap = torch.min(
            box_iou(boxes_h, self.recover_boxes(targets["boxes_h"], targets["size"])),
            box_iou(boxes_o, self.recover_boxes(targets["boxes_o"], targets["size"])),
        )
        x, y = torch.nonzero(overlap >= self.fg_iou_thresh).unbind(1)
        labels[x, targets["labels"][y]] = 1
        return labels

    def compute_interaction_loss(self, boxes, bh, bo, logits, prior, targets):
        """Focal loss of prior * sigmoid(logit), over the verbs each object has, per positive."""
        labels = torch.cat(
            [
                self.associate_with_ground_truth(bx[h], bx[o], target)
                for bx, h, o, target in zip(boxes, bh, bo, targets, strict=True)
            ]
        )
        prior = torch.cat(prior, 1).prod(0)
        used = prior > 0
        logits = torch.cat([*logits, labels[:0]])  # a batch may be without any pair
        score = (prior[used] * logits[used].sigmoid()).clamp(1e-6, 1 - 1e-6)
        labels = labels[used]
        positives = labels.sum()
        if dist.is_initialized():
            dist.all_reduce(positives)
            positives = positives / dist.get_world_size()
        right = torch.where(labels > 0, score, 1 - score)
        weight = torch.where(labels > 0, self.alpha, 1 - self.alpha)
        return -(weight * (1 - right) ** self.gamma * right.log()).sum() / positives.clamp(min=1)

    def prepare_region_proposals(self, results):
        """After NMS, the confident humans and objects: at least min_instances of each if there are, at most max."""
        props = []
        for result in results:
            scores, labels, boxes = result["scores"], result["labels"], result["boxes"]
            best_first = batched_nms(boxes, scores, labels, 0.5)
            keep = []
            for kind in (labels == self.human_idx, labels != self.human_idx):
                rows = best_first[kind[best_first]]
                confident = int((scores[rows] >= self.box_score_thresh).sum())
                keep.append(rows[: min(max(confident, self.min_instances), self.max_instances)])
            keep = torch.cat(keep)
            props.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return props

    def postprocessing(self, boxes, bh, bo, logits, prior, objects, image_sizes, flag=0):
        detections = []
        logits = torch.cat(logits).split([len(h) for h in bh])
        for bx, h, o, lg, pr, obj, size in zip(boxes, bh, bo, logits, prior, objects, image_sizes, strict=True):
            pr = pr.prod(0)
            x, y = torch.nonzero(pr).unbind(1)
            detections.append({
                "boxes": bx, "pairing": torch.stack([h[x], o[x]]), "scores": lg[x, y].sigmoid() * pr[x, y],
                "labels": y, "objects": obj[x], "size": size,
            })  # fmt: skip
        return detections

    def forward(self, images, targets=None):
        """images: a list of (image, image for CLIP). -> losses in training; detections or None in eval."""
        if self.training and targets is None:
            raise ValueError("training needs targets")
        clip_images = torch.stack([image[1] for image in images])
        device = clip_images.device
        image_sizes = torch.tensor([image[1].shape[-2:] for image in images], device=device)

        queries = self.detector.backbone(torch.stack([image[0] for image in images])).transpose(1, 2)
        outputs = {
            "pred_logits": self.detector.class_embed(queries),
            "pred_boxes": self.detector.bbox_embed(queries),
        }
        region_props = self.prepare_region_proposals(self.postprocessor(outputs, image_sizes))

        filenames = [target["filename"] for target in targets] if self.img_clip_pt else None
        prompts, contexts, visual_prompt = self.clip_head.prompt_learner(filenames=filenames)
        text, origin_text = self.clip_head.text_encoder(prompts, self.clip_head.tokenized_prompts, contexts)
        _, features = self.clip_head.image_encoder(clip_images, visual_prompt)
        logits, prior, bh, bo, objects, _, _, _ = self.compute_roi_embeddings(
            features, image_sizes, region_props, flag=0, hoitxt_features=text
        )
        boxes = [props["boxes"] for props in region_props]
        if self.training:
            return {
                "interaction_loss": self.compute_interaction_loss(boxes, bh, bo, logits, prior, targets),
                "sem_loss": 10 * semantic_loss(text, origin_text),
            }
        if not logits:
            return None
        return self.postprocessing(boxes, bh, bo, logits, prior, objects, image_sizes, flag=0)


def semantic_loss(text, origin):
    """Prompts may move the text features, but not who resembles whom: that is what unseen classes live on."""
    tuned, origin = (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T / 0.1 for x in (text, origin))
    return F.kl_div(tuned.log_softmax(1), origin.log_softmax(1), log_target=True, reduction="batchmean")


def select_interactions(args, features):
    """The two least similar interactions of every verb, and the seen one most like each unseen among them."""
    unseen = set(hico_unseen_index[args.zs_type]) if args.zs else set()
    hidden = unseen if args.without_unseen_name and not args.eval else set()
    similarity = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
    chosen = set()
    for verb in range(args.num_classes):
        rows = [i for i, v in enumerate(HOI_IDX_TO_ACT_IDX) if v == verb and i not in hidden]
        if rows:
            least = int(similarity[rows][:, rows].argmin())
            chosen |= {rows[least // len(rows)], rows[least % len(rows)]}
    seen = [i for i in range(len(features)) if i not in unseen]
    chosen |= {seen[int(similarity[i][seen].argmax())] for i in chosen & unseen}
    return sorted(chosen)


def build_detector(args, class_corr, object_n_verb_to_interaction, clip_model_path, num_anno=None, **_):
    detector = world.new_detector()
    if Path(args.pretrained).is_file():
        detector.load_state_dict(torch.load(args.pretrained, weights_only=True)["model_state_dict"])
    weights = torch.load(clip_model_path, weights_only=True)
    image_encoder, text_encoder = towers.ImageEncoder(), towers.TextEncoder(world.words())
    image_encoder.load_state_dict(weights["visual"])
    text_encoder.load_state_dict(weights["text"])

    sentences = list(hico_text_label.values())
    tokens = text_encoder.tokenize(sentences)
    with torch.no_grad():
        features = text_encoder.encode(text_encoder.token_embedding(tokens), tokens)
    select_HOI_index = select_interactions(args, features)
    descriptions = {}
    if args.act_descriptor:  # stand in for a language model's: the three most similar other sentences
        nearest = (features[select_HOI_index] @ features.T).topk(4).indices[:, 1:]
        descriptions = (features[nearest], list(range(len(select_HOI_index))))
    model = CustomCLIP(args, [sentences[i] for i in select_HOI_index], image_encoder, text_encoder)
    return UPT(
        args, detector, PostProcess(), model, human_idx=args.human_idx, num_classes=args.num_classes,
        object_class_to_target_class=class_corr, object_n_verb_to_interaction=object_n_verb_to_interaction,
        num_anno=num_anno, select_HOI_index=select_HOI_index, act_descriptor_feat_select=descriptions,
    )  # fmt: skip
