"""What adapting a model would cost, told without adapting it."""
