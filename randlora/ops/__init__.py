"""Autograd, compile and transform rules around the compiled operators of ``csrc/``."""
