"""A model as judge of the contestants' answers."""
