"""The files of a run, and everything that a person sees of it."""
