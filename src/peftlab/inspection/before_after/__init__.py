"""What fine-tuning changed: base and tuned model seen on the same tokens, in one loaded model."""
