"""Finding, loading, wrapping and saving models. Imports storage, cli and errors; knows no loss."""
