"""Context-KV attention: a language model that attends 32 compressed contexts instead of every past token."""

__version__ = "0.1.0"
