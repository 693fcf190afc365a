"""``fedpeft report``: saved runs as a page, figures and tables that others can read."""
