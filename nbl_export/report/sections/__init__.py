"""The value of report.json -> the blocks of the report, a subject a file. Nothing is drawn or written here."""
