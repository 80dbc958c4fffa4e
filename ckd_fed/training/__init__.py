"""Training: the step loop, early stopping, and the central run that never touches Flower."""
