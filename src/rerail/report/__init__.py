"""The page that shows the rows of many cells."""
