"""The one exception that the command line shows as a plain sentence."""


class UserError(Exception):
    """Something the user can put right: a bad file, flag, field or request.

    The message says what was found, what was needed, and which field or file to change. The command line
    prints it on one line and exits with status 2; every other exception is reported as our bug.
    """
