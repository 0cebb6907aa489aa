"""Align a small hybrid language model, make it one person's, and ship it to their device.

Importing the package loads nothing heavy: torch, transformers and the runtimes are imported by the functions
that need them.
"""

__version__ = "0.1.0"
