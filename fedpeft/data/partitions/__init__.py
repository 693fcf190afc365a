"""Partitions of the training rows over clients: the ``partition`` group."""
