"""A whole model with adapters: finding its layers, replacing them, and switching between adapters."""
