"""Errors that end a command. This module imports nothing, so that every other may raise them."""


class UserError(Exception):
    """A wrong command, config, data file or artifact: exit code 2, message without traceback.

    The message is one or two lines: what was expected, what came, and the override that fixes it.
    """


class TrainingError(Exception):
    """A training failed in a way that the user can fix: exit code 1, nothing stored."""


class LossNotFinite(TrainingError):
    """The loss or a weight became NaN or infinite. The epochs before may be worth keeping."""


class GuardError(TrainingError):
    """Other parameters than the declared ones changed: exit code 1, nothing stored."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__
