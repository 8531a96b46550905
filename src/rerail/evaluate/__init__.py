"""What was lost and what came back: perplexity, KL, routing and benchmark tasks."""
