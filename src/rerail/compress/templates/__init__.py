"""Templates: a family of methods with one function left open."""
