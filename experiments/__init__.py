"""The lectures' claims as experiments, and every router on one board: `hf-moe lab`."""
