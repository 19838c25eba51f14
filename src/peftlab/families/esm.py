"""ESM: the library's default config has neither a vocabulary nor the tokens that its embedding needs."""

CONFIG = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}
TWIN = {"token_dropout": False}
