"""BigBird: its sparse attention needs rows longer than a twin's; on short ones the library itself uses full attention."""

TWIN = {"attention_type": "original_full"}
