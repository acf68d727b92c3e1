"""Proof that engines compute the law: on a user's own model, and on equations."""
