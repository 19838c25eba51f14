"""LFM2 mixture of experts: the library's default config leaves the kinds of layers open."""

CONFIG = {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}
