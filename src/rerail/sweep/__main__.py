"""`python -m rerail.sweep` is `rerail-sweep`."""

from rerail.sweep.cli import main

if __name__ == "__main__":
    main()
