"""Data and files that commands are given, good and bad."""
