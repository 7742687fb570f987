"""`python -m amenable` is the `amenable` command."""

from amenable.cli.main import main

if __name__ == "__main__":
    main()
