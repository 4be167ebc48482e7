"""The many kinds of errors of Orbax and TensorStore become one."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from datarax_dist.buckets import advice, bucket_and_prefix
from datarax_dist.config import is_bucket
from datarax_dist.errors import CheckpointError, StorageError, cause, describe, storage_hint

__all__ = ["wrapped"]

_BUCKET_HINT = "`datarax-dist doctor --write` on this root tells whether the bucket is at fault."
_OS_ERROR = re.compile(r"os_error_code='([0-9]+)'")  # as TensorStore writes it


@contextlib.contextmanager
def wrapped(action: str, path: str) -> Iterator[None]:
    """Makes the many kinds of errors of Orbax and TensorStore one."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None and (found := _OS_ERROR.search(str(error))):
            number = int(found[1])
        if number is None and isinstance(_first(error), TimeoutError):
            number = errno.ETIMEDOUT  # Orbax's own deadline, which is just behind that of the save
        if isinstance(error, MemoryError) or (
            number is None and "RESOURCE_EXHAUSTED" in str(error)  # said of a full disk, too
        ):
            number = errno.ENOMEM  # of the host or the device: nothing is damaged
        hint = storage_hint(number)
        if number is None and is_bucket(path):
            number, hint = advice(error, bucket_and_prefix(path)[0]) or (None, _BUCKET_HINT)
        raise StorageError(
            f"Could not {action} the arrays: {_cause(error).rstrip('.')}. {hint}",
            errno=number,
        ) from cause(error)


def _cause(error: BaseException) -> str:
    """Returns what an error says, and before it what was its first cause: Orbax tells that last, or
    not at all.
    """
    first = _first(error)
    told = describe(error, 1000)
    return told if first is error else f"{describe(first, 400)} ({told})"


def _first(error: BaseException) -> BaseException:
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:  # it may be a circle
        error = error.__cause__
        seen.add(id(error))
    return error
