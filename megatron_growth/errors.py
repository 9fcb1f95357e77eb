"""The errors a user can meet, one class for each place where the remedy lies.

Each message is one line that says the value, why it cannot work, and what to change. The entry
points print that line and exit non-zero; nobody is shown a traceback for a mistake in a file of
theirs. All of them carry only their message, so they pickle: torch's distributed checkpoint sends
exceptions from rank to rank.
"""


class GrowthError(Exception):
    """Something the user can put right; the message says how."""


class ConfigError(GrowthError):
    """The configuration file or a command-line argument must change."""


class PlanError(GrowthError):
    """The growth asked for cannot be made from this source checkpoint."""


class CheckpointError(GrowthError):
    """The checkpoint on disk is missing, incomplete, damaged or of a format that cannot be
    grown."""
