"""What the compression did to the answers: flips, classes, divergences."""
