"""The methods, one file per family, which know nothing of Flower."""
