"""The one exception a user's mistake raises; its message says what is wrong, where, and what to do."""


class InputError(Exception):
    """Something the user can mend: a path, an option, a file, a disk. The command line prints it and exits with 2."""
