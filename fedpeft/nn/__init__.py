"""Layers only: nothing here knows of federation."""
