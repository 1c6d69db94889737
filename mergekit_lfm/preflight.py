"""What is checked before the first byte is written, and how the process is prepared for a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
