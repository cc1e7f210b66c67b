"""What adapting a model would cost in time and memory, told without adapting it."""
