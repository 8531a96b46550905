"""What is decided: plans as plain data, ratios, allocators, and how a plan is applied."""
