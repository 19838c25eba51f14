"""DBRX: the library's default attention config lacks the rotary base and the clipping value that its attention reads."""

CONFIG = {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 8}}
