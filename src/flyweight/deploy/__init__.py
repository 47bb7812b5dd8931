"""Floor 4: formats, runtimes, the clock, the latency table, the output folder."""
