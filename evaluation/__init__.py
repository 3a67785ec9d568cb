"""Metrics, and tables and plots drawn from finished run folders. Plots import matplotlib only when one is drawn."""
