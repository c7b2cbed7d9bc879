"""Flags of EZ-HOI with which upstream's own code cannot run."""

from __future__ import annotations

import argparse


def cannot_run(args: argparse.Namespace) -> dict[str, str]:
    """Flag, as the user writes it -> why upstream's code cannot run with it, and what to do; empty where nothing is wrong."""
    refused = {}
    if not getattr(args, "txtcls_pt", True):
        refused["--txtcls_pt (off)"] = "without it the host cannot unpack its text features: add --txtcls_pt"
    for flag in ("fix_txt_pt", "clip_test", "seperate_pre_pt", "init_txtcls_pt", "tpt"):
        if getattr(args, flag, False):
            refused[f"--{flag}"] = "upstream's code for it ends with an error: drop it"
    if getattr(args, "logits_type", "HO") == "HO+U+T":
        refused["--logits_type HO+U+T"] = "upstream's own default crashes: add --logits_type HO"
    return refused
