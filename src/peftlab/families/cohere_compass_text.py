"""Cohere Compass: the library's default config has no rotary parameters for its full attention."""

CONFIG = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
