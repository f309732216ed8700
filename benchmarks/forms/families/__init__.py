"""One family of forms a file."""
