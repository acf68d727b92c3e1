"""Doors into loops of a user's own: losses on a live graph, and the law as a function transform."""
