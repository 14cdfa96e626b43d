"""Running a model: its answers to prompts, and the likelihood that it gives to answers."""
