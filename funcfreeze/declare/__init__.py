"""What a user says: selectors, routes, and the plan they are resolved into."""
