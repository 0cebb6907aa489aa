"""Preference objectives: pure functions of per-token log-probabilities, and the table that names them."""
