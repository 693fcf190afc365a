"""Virtual clients: in one process, or on Ray's workers, on one machine or several."""
