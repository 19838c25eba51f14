"""Zamba: the shared attention works on twice the hidden width."""

TWIN = {"attention_head_dim": 32, "attention_hidden_size": 128}
