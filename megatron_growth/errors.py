"""The errors a user can meet, one class for each place where the remedy lies.

Each message is one line that says the value, why it cannot work, and what to change. The entry
points print that line and exit non-zero; nobody is shown a traceback for a mistake in a file of
theirs. All of them carry only their message, so they pickle: torch's distributed checkpoint sends
exceptions from rank to rank.
"""


class GrowthError(Exception):
    """Something the user can put right; the message says how."""

    exit_code = 2


class ConfigError(GrowthError):
    """The configuration file or a command-line argument must change."""


class PlanError(GrowthError):
    """The growth asked for cannot be made from this source checkpoint."""


class CheckpointError(GrowthError):
    """The checkpoint on disk is missing, incomplete, damaged or of a format that cannot be
    grown."""


class StageError(GrowthError):
    """A stage of an experiment ended before it was done; the exit code is the stage's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])
