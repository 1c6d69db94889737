"""Facts edited in saved models: requests and a model become a patch file, which the engine applies."""

from mergekit_lfm.edit.solve import edit

__all__ = ["edit"]
