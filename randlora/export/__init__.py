"""Where an adapter goes after training: into LoRA's format, and into the weights of the model."""
