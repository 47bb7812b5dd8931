"""One network as another one and little more: deltas between checkpoints, and small correctors beside a frozen source."""
