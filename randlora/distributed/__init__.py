"""Training on several devices: what randlora adds to the engines of ``torch.distributed``."""
