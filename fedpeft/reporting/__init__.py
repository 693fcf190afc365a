"""What a run writes and what a person sees of it."""
