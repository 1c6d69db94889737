"""What adapters of each kind do to a tensor of their model, a panel of its rows at a time."""
