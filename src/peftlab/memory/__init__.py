"""Memory: what a training step takes, whether it fits, and how large a batch may be, before a weight is read."""
