"""Errors that stop a command. Imports nothing, so that every module can raise them."""


class UserError(Exception):
    """An invalid command, config, data file or artifact: exit code 2 and a message without a traceback."""


class TrainingError(Exception):
    """A training failure that the user can fix: exit code 1, no artifact is saved."""


class LossNotFinite(TrainingError):
    """A NaN or infinite loss or weight. Weights of earlier epochs may still be usable."""


class GuardError(TrainingError):
    """A change of parameters that are not declared trainable: exit code 1, no artifact is saved."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the type of the error if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__
