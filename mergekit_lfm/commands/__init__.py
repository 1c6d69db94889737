"""The command line: `merge`, the main job, and `mergekit-lfm`, every command; a file for each theme.

Standard output carries the result, and with --json exactly one JSON object; everything else goes to standard error.
A command imports its workflow when it runs, so that --help is quick.
"""
