"""Zamba2: heads times head width of its state space is twice the hidden width."""

TWIN = {"n_mamba_heads": 8, "chunk_size": 256, "attention_head_dim": 32, "attention_hidden_size": 128}
