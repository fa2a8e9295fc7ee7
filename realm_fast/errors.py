"""Errors that people meet. Each carries the exit code the command line ends with.

A message names what was wrong, what was expected and what came, and, where there is one, the way out.
"""


class RealmFastError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UserError(RealmFastError):
    """Something the user gave is wrong: a file, a setting, an argument."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """An input file is missing, truncated, malformed or empty."""


class ProvenanceError(UserError):
    """Two artifacts do not belong together (index and encoder, index and corpus, store and tokenizer)."""


class CorruptArtifactError(UserError):
    """An artifact this package wrote is not as it was written (wrong size or hash)."""


class TrainingDivergedError(RealmFastError):
    """The loss or the gradient became NaN or infinite."""


class RefreshError(RealmFastError):
    """The refresher cannot go on."""


class DiskFullError(RealmFastError):
    """No space is left where an artifact should be written; nothing half-written is left behind."""


class MissingDependencyError(UserError):
    """An optional package is needed; the message says which extra installs it."""


class Interrupted(RealmFastError):
    """SIGINT or SIGTERM arrived; work was saved at the next safe point."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
