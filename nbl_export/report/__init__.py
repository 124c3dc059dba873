"""Results as a page and tables."""
