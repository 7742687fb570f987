"""Amenable: reinforcement learning from human feedback, from choices to a better model."""

__version__ = "0.1.0"
