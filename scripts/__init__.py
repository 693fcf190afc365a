"""Programs for this checkout: the tables of all tasks, and the documentation site."""
