"""Bytes and records: safetensors files, atomic folders, run.json. Imports errors and cli; knows no model."""
