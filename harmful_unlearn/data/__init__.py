"""From files to batches of token ids. Imports storage, cli and errors; knows no model and no loss."""
