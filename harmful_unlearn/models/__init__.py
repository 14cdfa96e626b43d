"""Finding, loading, wrapping and saving models. Imports storage and errors; knows no loss."""
