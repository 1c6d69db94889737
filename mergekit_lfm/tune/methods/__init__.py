"""Tuning methods: declarations and their functions. Files register themselves by being here.

Each defines `METHODS`, a tuple. Recipes and commands read the declarations without torch: a function imports what it
needs when it is called.
"""
