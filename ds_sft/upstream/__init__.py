"""What this package builds on that libraries do not promise."""
