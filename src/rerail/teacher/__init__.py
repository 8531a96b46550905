"""What the teacher says: its cached final hidden states, and the chunked KL to them."""
