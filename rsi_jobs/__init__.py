"""Recursive self-improvement of text-to-image diffusion models, as batch jobs."""

__version__ = "0.1.0"
