"""The error a user can act on."""


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do. The command line exits 2."""
