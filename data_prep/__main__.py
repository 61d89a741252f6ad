"""`python -m data_prep COMMAND`: the same as `perturbjax COMMAND`."""

from perturbjax.cli import main

if __name__ == "__main__":
    main()
