"""Declarations of methods, and merge methods, one file each, as pure functions.

A merge method is a value (`Method`) made of a generator `solve`, which asks for reductions over the inputs and returns
small coefficients, and an elementwise `apply`. Files of this package register themselves by being here: each defines
`METHODS`, a tuple. Nothing here imports torch; the functions work on any tensors. `kinds` has the declarations of
other methods, which are beside their code in the rooms above.
"""
