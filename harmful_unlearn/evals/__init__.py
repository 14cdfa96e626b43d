"""Measuring any model: answers, scores, verdicts. Imports all below but training and reporting."""
