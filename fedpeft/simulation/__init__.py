"""Virtual clients on one machine: in one process, or on Ray's workers."""
