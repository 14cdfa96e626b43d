"""What an evaluation keeps and writes: answers, scores, the base's own for later, and results."""
