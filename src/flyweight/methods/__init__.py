"""Floor 2: one file, one method; each quotes prices and applies its steps."""
