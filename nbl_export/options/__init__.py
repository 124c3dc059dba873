"""The options of a job: their record, and the rules that settle them."""
