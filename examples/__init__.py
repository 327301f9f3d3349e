"""Examples: configurations to train with, and modules that show how to write models and trials of one's own."""
