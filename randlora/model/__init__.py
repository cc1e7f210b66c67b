"""A whole model with adapters: finding its layers, wrapping them, and switching between adapters."""
