"""Who holds which rows: the ``partition`` group."""
