"""Data sets, tasks, partitions and batches; nothing here knows of methods."""
