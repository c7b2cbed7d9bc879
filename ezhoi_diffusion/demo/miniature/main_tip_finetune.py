"""Entry of the miniature EZ-HOI: EZ-HOI's command line and order of steps, on a CPU.

Differs from the real EZ-HOI: gloo instead of nccl, flags that would choose nothing here are absent, and the
defaults of some fit the small world. Training fails on the file names in the targets, as upstream's does with
the published pocket, unless the launcher helps.
"""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hico_text_label import ACT_IDX_TO_ACT_NAME, CORRESPONDENCE, hico_unseen_index
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from upt_tip_cache_model_free_finetune_distillself import build_detector
from utils_tip_cache_and_union_finetune import CustomisedDLE, DataFactory, custom_collate


def main(rank, args):
    torch.set_num_threads(1)  # more gain nothing on maps this small, and lose much where cores are shared
    dist.init_process_group("gloo", init_method="env://", world_size=args.world_size, rank=rank)
    seed = args.seed + dist.get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)

    args.clip_model_name = {"ViT-B-16": "ViT-B/16"}[Path(args.clip_dir_vit).stem]
    common = {"name": args.dataset, "data_root": args.data_root, "clip_model_name": args.clip_model_name}
    trainset = DataFactory(
        partition=args.partitions[0], zero_shot=args.zs, zs_type=args.zs_type, num_classes=args.num_classes,
        **common,
    )  # fmt: skip
    testset = DataFactory(partition=args.partitions[1], **common)
    train_loader = DataLoader(
        dataset=trainset, collate_fn=custom_collate, batch_size=args.batch_size, num_workers=args.num_workers,
        drop_last=True, sampler=DistributedSampler(trainset, num_replicas=args.world_size, rank=rank),
    )  # fmt: skip
    test_loader = DataLoader(
        dataset=testset, collate_fn=custom_collate, batch_size=1, num_workers=args.num_workers, drop_last=False,
        sampler=SequentialSampler(testset),
    )  # fmt: skip

    args.human_idx = 0
    if args.dataset == "vcoco":
        for part in (trainset.dataset, testset.dataset):  # the data set itself knows no interactions
            part.object_n_verb_to_interaction = part.table_of(CORRESPONDENCE)
        object_to_target, num_anno = list(trainset.dataset.object_to_action.values()), None
    else:
        object_to_target = trainset.zs_object_to_target if args.zs else trainset.dataset.object_to_verb
        num_anno = torch.as_tensor(trainset.dataset.anno_action)
    upt = build_detector(
        args, object_to_target,
        object_n_verb_to_interaction=trainset.dataset.object_n_verb_to_interaction,
        clip_model_path=args.clip_dir_vit, num_anno=num_anno,
    )  # fmt: skip
    if args.eval and args.dataset == "hicodet":
        upt.object_class_to_target_class = testset.dataset.object_to_verb

    checkpoint = None
    if os.path.exists(args.resume):  # noqa: PTH110 - "" means none, and Path("") is the current folder
        print(f"Rank {rank}: continue from {args.resume}")
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        upt.load_state_dict(checkpoint["model_state_dict"], strict=False)
    else:
        print(f"Rank {rank}: start from a randomly initialised model")

    engine = CustomisedDLE(
        upt, train_loader, max_norm=args.clip_max_norm, num_classes=args.num_classes,
        print_interval=args.print_interval, find_unused_parameters=True, cache_dir=args.output_dir,
    )  # fmt: skip

    if args.cache:
        getattr(engine, "cache_vcoco" if args.dataset == "vcoco" else "cache_hico")(test_loader, args.output_dir)
        return
    if args.eval:
        upt.eval()
        if args.dataset == "vcoco":
            raise NotImplementedError("V-COCO has no evaluation here")
        ap = engine.test_hico(test_loader, args)
        rare = torch.as_tensor(trainset.dataset.anno_interaction) < 10
        full, rare_ap, non_rare_ap = (float(x.mean()) * 100 for x in (ap, ap[rare], ap[~rare]))
        print(f"The mAP is {full:.2f}, rare: {rare_ap:.2f}, none-rare: {non_rare_ap:.2f},")
        if args.zs:
            unseen = torch.zeros(len(ap), dtype=torch.bool)
            unseen[hico_unseen_index[args.zs_type]] = True
            print(f"zero-shot ({args.zs_type})")
            print(f"full mAP: {full:.2f} unseen: {ap[unseen].mean() * 100:.2f} seen: {ap[~unseen].mean() * 100:.2f}")
        return

    upt.detector.requires_grad_(False)
    for name, parameter in upt.clip_head.named_parameters():
        parameter.requires_grad_("prompt_learner" in name)
    trained = [(name, p) for name, p in upt.named_parameters() if p.requires_grad]
    prompts, heads = ([p for name, p in trained if ("clip_head" in name) == side] for side in (True, False))
    groups = [{"params": prompts, "lr": args.lr_vit}, {"params": heads, "lr": args.lr_head}]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    progress = {}
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optim_state_dict"])
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        progress = {key: checkpoint[key] for key in ("epoch", "iteration")}
    engine.update_state_key(optimizer=optimizer, lr_scheduler=scheduler, **progress)
    (Path(args.output_dir) / "args.txt").write_text(json.dumps(vars(args), indent=2))
    engine(args.epochs)


# Names are EZ-HOI's, which other programs pass. A value is the default, and gives the type.
VALUES = {
    "hicodet": ["dataset"],
    "checkpoints": ["output-dir"],
    "./hicodet": ["data-root"],
    "ViT-B-16.pt": ["clip_dir_vit"],
    "clip_img_hicodet_train": ["clip_img_file"],
    "rare_first": ["zs_type"],
    "HO": ["logits_type"],
    "1233": ["port"],
    "": ["pretrained", "resume", "self_image_path"],
    0: ["num-workers"],
    1: ["world-size"],
    2: ["N_CTX"],
    3: ["min-instances"],
    5: ["lr-drop"],
    6: ["epochs"],
    8: ["batch-size"],
    15: ["max-instances"],
    20: ["print-interval"],
    64: ["emb_dim"],
    66: ["seed"],
    len(ACT_IDX_TO_ACT_NAME): ["num_classes"],
    1e-4: ["weight-decay"],
    5e-4: ["lr-head"],
    1e-3: ["lr-vit"],
    0.1: ["clip-max-norm"],
    0.2: ["gamma", "box-score-thresh"],
    0.5: ["alpha", "fg-iou-thresh"],
    2.8: ["hyper_lambda"],
}
SWITCHES = [
    "eval",
    "cache",
    "act_descriptor",
    "zs",
    "txtcls_pt",
    "img_align",
    "txt_align",
    "img_clip_pt",
    "without_unseen_name",
]


def command_line():
    parser = argparse.ArgumentParser(description="The miniature EZ-HOI.")
    for default, names in VALUES.items():
        for name in names:
            choices = list(hico_unseen_index) if name == "zs_type" else None
            parser.add_argument(
                f"--{name}", default=default, type=type(default), choices=choices, help=f"({default!r})"
            )
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--partitions", nargs=2, default=["train2015", "test2015"], help="training and test split")
    return parser


if __name__ == "__main__":
    parser = command_line()
    args = parser.parse_args()
    print(args)

    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = args.port
    if args.world_size == 1:
        main(0, args)
    else:
        mp.spawn(main, nprocs=args.world_size, args=(args,))
