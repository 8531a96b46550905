"""`python -m rerail.track`: the report."""

from rerail.track.cli import main

main()
