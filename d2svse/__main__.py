"""`python -m d2svse` is `d2svse`."""

from d2svse.cli.app import main

if __name__ == "__main__":
    main()
