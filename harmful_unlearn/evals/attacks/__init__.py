"""Attacks: other ways to ask for the same harm. Each changes the prompts or the decoding, and never the model."""
