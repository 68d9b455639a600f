"""The one exception for what a user can mend.

Everything else that goes wrong is a defect of gpusq and keeps its traceback.
"""

from __future__ import annotations


class GpusqError(Exception):
    """Something is wrong with what the user gave, and the user can mend it.

    Attributes:
        message: one line that names the file, layer or option at fault.
        hint: one line that says how to mend it; empty where there is nothing to add.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
