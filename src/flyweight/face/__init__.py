"""Floor 5, what people see: command line, report, model card, tables, progress. Reads records, decides nothing."""
