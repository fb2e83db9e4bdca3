"""`python -m fedseg` is the `fedseg` command."""

from fedseg.cli import main

if __name__ == "__main__":
    main()
