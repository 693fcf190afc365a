"""The parts of the documentation site that are computed when it is built."""
