"""Edit facts in saved models: turn requests and a model into a patch file, which the engine applies."""

from mergekit_lfm.edit.solve import edit

__all__ = ["edit"]
