"""SKU in two stages: harmful knowledge acquisition, then knowledge negation (Liu et al. 2024)."""
