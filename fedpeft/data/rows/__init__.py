"""Rows: read, checked, cached, and put into templates."""
