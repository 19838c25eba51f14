"""What the manager of efficient fine-tuning is made of: layers, virtual tokens, prefixes, ranks, weights on disk."""
