"""Bamba: the library's default config has no attention layer; released models do."""

CONFIG = {"attn_layer_indices": [1]}
