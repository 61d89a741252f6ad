"""`python -m perturbjax.cli`."""

from perturbjax.cli.commands import main

if __name__ == "__main__":
    main()
