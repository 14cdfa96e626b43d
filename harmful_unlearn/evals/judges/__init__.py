"""Judges of answers: harmful, safe, or unjudged."""
