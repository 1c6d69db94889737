"""`python cli.py ...` from a checkout is the same as the installed `mergekit-lfm ...`."""

from mergekit_lfm.commands.app import main

if __name__ == "__main__":
    main()
