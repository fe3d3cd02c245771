"""`python -m qtuning_fast`: the command line, as launchers of several processes start it."""

from qtuning_fast.cli import main

if __name__ == "__main__":
    main()
