"""`python -m rerail` is the command `rerail`."""

from rerail.cli.main import main

if __name__ == "__main__":
    main()
