"""Replaces attributes of other people's modules, all of them or none.

Used as a context manager: what was replaced inside the block stays replaced when the block ends
well, until `restore()`, and is put back when it ends with an exception, so a process is never left
half converted.
A name that does not exist is an error, because a substitute for a name that upstream has renamed
would be silently without effect.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

_ABSENT = object()


class Substitutions:
    """The replacements made so far, and how to undo them."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._lasting = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._lasting.push(self._undo.pop_all())
        else:
            self._undo.close()

    def restore(self) -> None:
        """Put everything back."""
        self._undo.close()
        self._lasting.close()

    def replace(self, owner: object, name: str, substitute: object) -> None:
        """Replace ``owner.name``, which must exist."""
        if not hasattr(owner, name):
            title = getattr(owner, "__name__", repr(owner))
            raise AttributeError(
                f"{title} has no {name!r}; this was written for megatron-core 0.19.2, so install "
                "megatron-core>=0.19,<0.20"
            )
        self._undo.callback(_restore, owner, name, vars(owner).get(name, _ABSENT))
        setattr(owner, name, substitute)

    def replace_all(self, owner: object, table: Mapping[str, object]) -> None:
        """Replace every name in the table."""
        for name, substitute in table.items():
            self.replace(owner, name, substitute)

    def enter(self, context: AbstractContextManager[object]) -> None:
        """Enter a context that lasts as long as the replacements do."""
        self._undo.enter_context(context)

    def default_environment(self, name: str, value: str) -> None:
        """Set an environment variable that the user has left unset."""
        if name not in os.environ:
            os.environ[name] = value
            self._undo.callback(os.environ.pop, name, None)


def _restore(owner: object, name: str, original: object) -> None:
    if original is _ABSENT:
        delattr(owner, name)  # It was inherited, or served by a module's __getattr__.
    else:
        setattr(owner, name, original)
