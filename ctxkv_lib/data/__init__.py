"""Sources of text, tokens and the frozen token table."""
