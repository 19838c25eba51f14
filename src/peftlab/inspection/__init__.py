"""Looking into a model: activations, attention, words; everything finds its modules through the family map."""
