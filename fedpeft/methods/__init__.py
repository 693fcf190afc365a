"""The methods: one file per family; nothing here knows of Flower."""
