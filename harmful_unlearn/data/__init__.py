"""From files to batches of token ids. Imports storage and errors; knows no model and no loss."""
