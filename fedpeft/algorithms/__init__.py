"""Federated algorithms, which are independent of the method: the ``strategy`` group."""
