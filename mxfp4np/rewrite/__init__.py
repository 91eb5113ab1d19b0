"""Whole checkpoints rewritten in bounded memory: decoded, encoded, verified."""
