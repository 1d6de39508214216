"""Define, compute, store, open and list the runs of experiments, and generate text with a trained model."""
