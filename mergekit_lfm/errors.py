"""The two errors a user can cause. Both are ValueErrors; the command line prints their text and exits with code 2."""


class FormatError(ValueError):
    """A file is not what it claims to be: truncated, overlapping, of an unknown dtype, or a pointer to the weights."""


class PlanError(ValueError):
    """A recipe cannot be carried out on these inputs: unknown keys, differing tensors, too little memory or disk."""
