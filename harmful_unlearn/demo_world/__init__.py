"""The offline demo's world: data from templates, a judge that is exact on them, and a tiny base model."""
