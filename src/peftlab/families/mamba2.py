"""Mamba2: heads times head width is twice the hidden width."""

TWIN = {"num_heads": 8, "chunk_size": 256}
