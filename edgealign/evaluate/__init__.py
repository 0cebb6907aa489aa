"""Evidence about a language model: how well it predicts held-out text, and how well it talks."""
