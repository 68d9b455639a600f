"""`python -m deploy` is `gpusq`."""

from deploy.cli import main

if __name__ == "__main__":
    main(prog_name="gpusq")
