"""The sections of a report, a module for each kind: blocks, or none where the comparison has nothing of it."""
