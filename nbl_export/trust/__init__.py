"""Checks of untrusted files before a library reads them, and of untrusted text before a terminal shows it."""
