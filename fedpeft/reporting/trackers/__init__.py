"""Programs that keep the numbers of many runs, each an extra of its own."""
