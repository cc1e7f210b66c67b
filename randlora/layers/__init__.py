"""Adapted layers: what a model's layer is replaced by, from its first call to its merged weight."""
