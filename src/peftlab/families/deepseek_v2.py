"""DeepSeek-V2: the library's default config leaves the number of chosen experts open."""

CONFIG = {"num_experts_per_tok": 6}
