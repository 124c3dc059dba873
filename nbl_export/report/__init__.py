"""Results as a page, tables and plots."""
