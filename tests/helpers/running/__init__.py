"""Runs of the script, in this process and in others."""
