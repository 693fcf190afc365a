"""Data sets, tasks, partitions and batches, which know nothing of methods."""
