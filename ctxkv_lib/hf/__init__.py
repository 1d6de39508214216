"""The transformers model around the method."""
