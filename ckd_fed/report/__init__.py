"""The report of a run: one HTML file that needs nothing else, and a PNG of each of its figures."""
