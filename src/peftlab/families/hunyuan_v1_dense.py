"""HunYuan dense: the library's default config has no head width, which its rotary embedding needs."""

CONFIG = {"head_dim": 128}
