"""`python -m sheepfold`: the command line."""

from sheepfold.cli import main

if __name__ == "__main__":
    main()
