"""Talking with models: a conversation with each, in the terminal and as a page in the browser."""
