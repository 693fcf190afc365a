"""Values that tests expect, written by hand."""
