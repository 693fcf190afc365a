"""Ratios of two or more ways to do the same, each measured in one run: python -m benchmarks."""
