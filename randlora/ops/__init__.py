"""What PyTorch has to know of the operators: their derivatives, their shapes, and the rules of ``torch.func``."""
