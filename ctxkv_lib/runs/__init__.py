"""Define, run, store, open and list experiments, and generate text with a trained model."""
