"""The model extensions document's classes: LoRA, a new transformer layer, or both, one base for any number of tasks."""
