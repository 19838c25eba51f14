"""Qwen4 experimental: the library's default config leaves its sparse attention open."""

CONFIG = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
