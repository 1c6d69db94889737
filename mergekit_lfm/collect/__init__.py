"""Statistics of a model on data, collected by running it: Gram matrices of layers' inputs, cross moments, Fisher.

The result is a statistics file (`mergekit_lfm.stats`) that merges, alignment and edits read without the model.
`registry` names the kinds; each is one class that declares its entries and adds batches to their sums.
"""

from mergekit_lfm.collect.driver import collect_stats

__all__ = ["collect_stats"]
