"""Defaults that the command line shows without loading torch."""

FOLDS = 5  # of images and of verbs, in `tune`
SEEDS = 1  # of each fit that draws numbers, in `tune`
