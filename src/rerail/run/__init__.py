"""One cell: its choices, its steps, and the rows that it leaves."""
