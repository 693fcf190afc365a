"""The model out: a finished run as a folder that other programs load, and answers of both."""
