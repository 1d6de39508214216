"""Parts of a user's own: how they are named, known by their code, tried, and built."""
