"""Aligners, one file each: a declaration and a function. Files register themselves by being here.

Each defines `METHODS`, a tuple. Recipes and commands read the declarations without torch: a function imports what it
needs when it is called.
"""
