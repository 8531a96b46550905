"""What was found: rows of results, their mirrors, and the page that shows them."""
