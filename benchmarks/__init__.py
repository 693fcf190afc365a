"""Benchmarks: ratios of two or more ways to do the same work, measured in one run."""
