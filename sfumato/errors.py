"""Mistakes the user can mend (kept apart from `types`, so that `--help` need not load torch)."""


class UserError(ValueError):
    """A mistake the user can mend: one line that says what, where and what to do.

    Args:
        message: The line to print.
        code: Exit code of the command line: 2 for wrong usage or settings, 1 for bad data or a failure at run time.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
