"""Statistics of a model on data, collected by running it: Gram matrices of layers' inputs, cross moments, Fisher.

The result is a statistics file, from which merges, alignment and edits work without the model. `methods/` has the
kinds; the code of a kind is one class that says which entries it has and adds a batch to their sums.
"""
