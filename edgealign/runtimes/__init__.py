"""One Session protocol over the runtimes: torch (the oracle), llama.cpp, and a scripted double."""
