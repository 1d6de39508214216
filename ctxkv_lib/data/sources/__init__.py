"""Where conversations come from, one source a file; all give rows of the same kind, piece by piece."""
