"""Where text, tokens and the frozen token table come from."""
