"""What was lost and what came back: perplexity, benchmark tasks, routing."""
