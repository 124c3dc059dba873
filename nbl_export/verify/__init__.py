"""The verification ladder: a run's graphs are compared with their references."""
