"""`python -m data_prep COMMAND`, equivalent to `perturbjax COMMAND`."""

from perturbjax.cli import main

if __name__ == "__main__":
    main()
