"""The one exception a user's mistake raises; its message says what is wrong, where, and what to do."""


class InputError(Exception):
    """Something the user can mend: a path, an option, a file, a disk. The command line prints it and exits with 2.

    Messages quote what files hold, so they are made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` on one line, with escapes for what could move a terminal's cursor, colour it, or reverse the writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: Exception) -> str:
    """The first line of what a library said, at most 200 characters; of its cause where it names one."""
    cause = error.__cause__ or error  # datasets wraps what went wrong in a sentence that says nothing
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
