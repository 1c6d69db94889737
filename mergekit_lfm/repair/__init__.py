"""REPAIR: a merged model's hidden units brought back to the mean and spread that they have in the models it is of."""

from mergekit_lfm.repair.folders import repair
from mergekit_lfm.repair.modules import Repaired, RepairedLayer, repair_module

__all__ = ["Repaired", "RepairedLayer", "repair", "repair_module"]
