"""What is measured: statistics, the passes that fill them, and the store that keeps them."""
