"""What is decided: plans as plain data, ratios and allocators, and the one function that applies a plan."""
