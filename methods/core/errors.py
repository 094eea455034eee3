"""Errors a user can make. Each message is one line: what was given, and what is allowed."""


class CompressError(ValueError):
    """Base of every error that is the caller's to fix; the command line prints it without a traceback."""


class CompressWarning(UserWarning):
    """What a caller should know of a result, though nothing went wrong."""


class BudgetError(CompressError):
    """A budget field that the method cannot honour, is missing, or is out of range."""


class ConfigError(CompressError):
    """A configuration value or name outside what is allowed."""


class GraphError(CompressError):
    """A network that cannot be traced, or an operator or layer that the requested step does not support."""


class FormatError(CompressError):
    """A file that is not a compressed model, or is damaged, truncated or of another version."""


class TrainingDiverged(CompressError):
    """The loss became infinite or NaN; the message says at which step and which knob to change."""
