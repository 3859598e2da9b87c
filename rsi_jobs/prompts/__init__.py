"""Prompt construction: sources of raw prompts, and the filters that choose among them."""
