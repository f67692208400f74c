"""`InputError`, the exception for user mistakes; its message says what is wrong, where, and what to do."""


class InputError(Exception):
    """Something the user can fix: a path, an option, a file, a full disk. The command line prints it and exits with 2.

    Messages may quote untrusted files, so control characters are escaped (`printable`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnknownOptionError(InputError):
    """A file's options ask for what is computed neither here nor by a library that would read the file otherwise."""


def printable(text: str) -> str:
    """Return `text` on one line, with control characters and bidirectional overrides escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, or of the message of its cause; at most 200 characters."""
    cause = error.__cause__ or error  # datasets wraps the actual error in one without information
    if isinstance(cause, KeyError):
        return f"it lacks {cause}"
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not text in UTF-8, from byte {cause.start} on"
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
