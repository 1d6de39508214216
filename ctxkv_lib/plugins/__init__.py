"""A user's own parts: name them, identify them by their code, try them, and build them."""
