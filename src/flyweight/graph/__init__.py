"""Floor 1: from a model to facts, and the cuts."""
