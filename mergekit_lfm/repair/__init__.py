"""REPAIR: restore the mean and spread of a merged model's hidden units to those in the models that were merged."""

from mergekit_lfm.repair.folders import repair
from mergekit_lfm.repair.modules import Repaired, RepairedLayer, repair_module

__all__ = ["Repaired", "RepairedLayer", "repair", "repair_module"]
