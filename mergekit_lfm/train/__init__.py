"""The one training loop: data in batches, losses, steps that can be interrupted and go on to the same bytes."""
