"""Prefill, decode, first token, memory and swap, measured in fresh processes and reported with their spread."""
