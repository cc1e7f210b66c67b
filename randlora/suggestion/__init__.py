"""What to set for a model, what that costs, and what was measured for it: behind ``randlora.suggest``."""
