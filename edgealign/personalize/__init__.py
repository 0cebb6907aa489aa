"""Per-user adapters: from a handful of one person's choices to something a session can load."""
