"""Load conversations, turn them into tokens, and load or make the frozen token table."""
