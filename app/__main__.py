"""`python -m app` is the console script `opa-quotes`."""

from app.cli import main

if __name__ == "__main__":
    main()
