"""Stage 2, task arithmetic on folders. Imports storage and errors; knows no loss and no run."""
