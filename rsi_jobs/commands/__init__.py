"""The commands of `rsi`, one module for each group of them. They import what they need when they run."""
