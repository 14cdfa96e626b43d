"""What a comparison measures beside the test sets: alphas, kinds of harm."""
