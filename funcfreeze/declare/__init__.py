"""What a user says: selectors, routes, schedules, and the plan they are resolved into."""
