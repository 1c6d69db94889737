"""The changes that adapters of each kind make to a tensor of their model, a panel of its rows at a time."""
