"""Errors of files that cannot be written: which file, why, and what is left of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, left: str) -> Iterator[None]:
    """Adds the path, and what is left of the output, to errors of a full or failing disk.

    Python's errors of failed writes name no file, and libraries raise errors of their own with the
    system's message alone.

    Args:
      path: the output, as the user named it.
      left: what is left of it, and how to continue.

    Raises:
      OSError: writing failed, with `path` as its filename. Errors that name a file pass unchanged.
    """
    try:
        yield
    except BrokenPipeError:  # of what is printed meanwhile
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _disk_error(error)
        reason = str(error) if number is None else os.strerror(number)
        if isinstance(error, OSError) and number is None:  # numpy says only how much it wrote
            number = errno.EIO
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, f"{reason}; {left}", os.fspath(path)) from error


def _disk_error(error: Exception) -> int | None:
    """Returns the errno whose message a library's error quotes; None if it quotes none."""
    return next((n for n in _DISK_ERRORS if os.strerror(n) in str(error)), None)
