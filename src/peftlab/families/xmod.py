"""X-MOD: every input has a language, which chooses the adapter modules of its blocks."""

TWIN = {"default_language": "en_XX"}
