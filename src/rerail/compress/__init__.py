"""Who decides: the compressor, the templates that leave one function open, and solvers."""
