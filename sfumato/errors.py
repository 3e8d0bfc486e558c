"""Errors that the user can fix (separate from `types`, so that `--help` does not load torch)."""


class UserError(ValueError):
    """An error that the user can fix: one line that says what is wrong, where, and what to do.

    Args:
        message: The line to print.
        code: Exit code of the command line: 2 for wrong usage or settings, 1 for bad data or a failure at run time.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
