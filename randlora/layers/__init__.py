"""Adapted layers: what stands in the place of a model's layer, from its first call to its merged weight."""
