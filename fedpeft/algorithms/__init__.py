"""Server and client algorithms, independent of the method: the ``strategy`` group."""
