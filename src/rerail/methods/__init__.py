"""One file per published method. Nothing imports them: a yaml names the class."""
