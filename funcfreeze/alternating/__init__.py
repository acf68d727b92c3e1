"""Training by turns: several steps over one model and one state."""
