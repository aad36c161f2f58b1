"""The model as PyTorch modules."""
