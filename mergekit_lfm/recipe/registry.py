"""The methods of every kind by name, as the files that hold them declare them.

Merge methods are in the room `methods`. The others are beside the code that they call, in rooms above this one, which
no import here names: a folder is read by its name, and a file in it imports no torch until its function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mergekit_lfm.methods import METHODS
from mergekit_lfm.methods.kinds import AlignMethod, AnyMethod, EditMethod, StatisticMethod
from mergekit_lfm.methods.registry import find_methods

ALIGN_METHODS = find_methods("mergekit_lfm.align.methods", AlignMethod)
EDIT_METHODS = find_methods("mergekit_lfm.edit.methods", EditMethod)
STATISTIC_METHODS = find_methods("mergekit_lfm.collect.methods", StatisticMethod)

KINDS: Mapping[str, Mapping[str, AnyMethod]] = MappingProxyType(
    {"merge": METHODS, "align": ALIGN_METHODS, "edit": EDIT_METHODS, "stats": STATISTIC_METHODS}
)
