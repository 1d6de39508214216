"""The published method and exact contexts: tensors in, tensors out."""
