"""Hyper-parameter search: the same number of trials for every method, on validation prompts. Top of the package."""
