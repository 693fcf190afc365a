"""Codecs of what goes over the wire: the ``compression`` group."""
