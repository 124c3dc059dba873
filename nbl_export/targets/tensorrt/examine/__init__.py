"""What acceptance needs of an engine beside running it: a plan without the runner, a view into a session, events."""
