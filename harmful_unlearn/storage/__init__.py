"""Bytes and records: safetensors files, atomic folders, run.json. Imports errors; knows no model."""
