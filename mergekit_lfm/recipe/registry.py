"""The methods of every kind by name, as the files that hold them declare them.

Merge methods are in the room `methods`. The others are beside the code that they call, in rooms above this one, which
no import here names: a folder is read by its name, and a file in it imports no torch until its function is called.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lfm.methods.find import find_methods
from mergekit_lfm.methods.kinds import AlignMethod, AnyMethod, EditMethod, StatisticMethod, TuneMethod

ALIGN_METHODS = find_methods("mergekit_lfm.align.methods", AlignMethod)
EDIT_METHODS = find_methods("mergekit_lfm.edit.methods", EditMethod)
STATISTIC_METHODS = find_methods("mergekit_lfm.collect.methods", StatisticMethod)
TUNE_METHODS = find_methods("mergekit_lfm.tune.methods", TuneMethod)


def all_methods() -> Mapping[str, Mapping[str, AnyMethod]]:
    """The methods by kind and name, those that merge first."""
    from mergekit_lfm.methods.registry import METHODS

    return {
        "merge": METHODS,
        "align": ALIGN_METHODS,
        "edit": EDIT_METHODS,
        "stats": STATISTIC_METHODS,
        "tune": TUNE_METHODS,
    }
