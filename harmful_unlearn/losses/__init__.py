"""Values and gradients: SKU's terms, the methods' weights, the landing point. Imports data and models."""
