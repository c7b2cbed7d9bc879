"""Defaults that the command line shows without loading torch."""

FOLDS = 5  # of images and of verbs, in `tune`
MIN_FOLDS = 3  # the outer loop leaves out one fold, the inner one another
SEEDS = 1  # of each fit that draws numbers, in `tune`
