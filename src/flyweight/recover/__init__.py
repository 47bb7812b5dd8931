"""Floor 2: what changes values, never the plan."""
