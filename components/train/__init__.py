"""Training on plain autograd."""
