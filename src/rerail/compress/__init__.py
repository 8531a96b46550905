"""Who decides: compressors, the templates that leave one function open, and one file per method."""
