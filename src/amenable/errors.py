"""Every error that Amenable raises on purpose.

AmenableError
├── UsageError (ValueError)         bad command line or recipe; exit code 2
│   └── RecipeError                 a recipe key or value is wrong; names file, key and remedy
├── DataError (ValueError)          a row or file is wrong; names file, line, field; exit code 2
├── ModelError (ValueError)         a model folder, hub id or tokenizer cannot be used; exit code 2
├── NumericsError (ArithmeticError) training would be silently wrong; exit code 1
├── StageError (RuntimeError)       a stage cannot run or finish; exit code 1
└── StorageError (OSError)          a file cannot be written (disk full, read-only); exit code 1
"""

from __future__ import annotations


class AmenableError(Exception):
    """Base of all errors with a message meant for the user; `exit_code` is the process's."""

    exit_code = 1


class UsageError(AmenableError, ValueError):
    """The command line or a recipe asks for something that cannot be done."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a mistyped value or values that contradict each other."""


class DataError(AmenableError, ValueError):
    """A data file is missing, empty or has a faulty row.

    Args:
        message: what was wrong and what to do.
        path: the file, if one is to blame.
        line: 1-based line number in it.
        field: the key of the row.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        where = ":".join(str(part) for part in (path, line) if part is not None)
        prefix = f"{where}: " if where else ""
        named = f"field {field!r}: " if field else ""
        super().__init__(f"{prefix}{named}{message}")
        self.path, self.line, self.field, self.reason = path, line, field, message


class ModelError(AmenableError, ValueError):
    """A model folder or hub id is missing, incomplete or of an unsupported kind."""

    exit_code = 2


class NumericsError(AmenableError, ArithmeticError):
    """A number that must hold (ratio 1, KL 0, a finite loss) does not."""


class StageError(AmenableError, RuntimeError):
    """A stage cannot run with what the run folder holds."""


class StorageError(AmenableError, OSError):
    """A file could not be written; nothing half-written was kept."""
