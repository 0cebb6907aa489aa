"""`python -m edgealign`: the same as the `edgealign` command."""

from edgealign.cli import main

if __name__ == "__main__":
    main()
