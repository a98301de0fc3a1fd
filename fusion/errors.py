"""The ways a command can end badly. Kept apart from everything so that all may raise them."""


class UserError(Exception):
    """A wrong command, config, data file or artifact: exit code 2, message without traceback.

    The message is one or two lines: what was expected, what came, and the override that mends it.
    """


class TrainingError(Exception):
    """A training went wrong in a way that has a cure: exit code 1, nothing stored."""


class LossNotFinite(TrainingError):
    """The loss or a weight became NaN or infinite. Epochs before it may be worth keeping."""


class GuardError(TrainingError):
    """The promise that only the declared parameters change was broken: exit code 1, nothing stored."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__
