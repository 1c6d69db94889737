"""`python -m mergekit_lfm` is `mergekit-lfm`."""

from mergekit_lfm.commands.app import main

main(prog_name="mergekit-lfm")
