"""Training: one tree layout, one log-probability function, SFT, preference training and merging."""
