"""One run: the only room that knows all others."""
