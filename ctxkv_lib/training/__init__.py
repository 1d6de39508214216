"""Phase 1, Phase 2, and what lies between them: contexts of a stream, caches, losses, evaluation."""
