"""Where rows go while a cell runs: Weights & Biases, and the journal of what was sent."""
