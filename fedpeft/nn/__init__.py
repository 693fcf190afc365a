"""Neural network layers, which know nothing of federation."""
