"""A recipe and headers become a plan: pure data, every output offset known before work starts."""
