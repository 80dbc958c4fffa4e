"""Counterfactual knowledge distillation: losses, causal effects and the weighting that joins them."""
