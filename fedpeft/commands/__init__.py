"""The commands of the command line; nothing but ``cli.py`` imports these modules."""
