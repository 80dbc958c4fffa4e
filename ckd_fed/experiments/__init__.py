"""Experiments: many runs by recipe, ending in one table and one figure."""
