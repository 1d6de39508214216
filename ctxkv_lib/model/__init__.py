"""The Hugging Face model. This folder stands alone: its files are saved beside the weights."""
