"""Values as tagged JSON and back: what data positions and inline leaves are written as. Never
pickle.

JSON itself carries None, bool, str, finite floats, lists, dicts with string keys, and ints of up to
53 bits. Everything else is an object with the single key `$` + tag: tuples, bytes, dicts with other
keys, big ints, non-finite floats and numpy arrays. A dict that has a key beginning with `$` is
tagged too, so that nothing can be mistaken for a tag.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

__all__ = ["DecodeError", "EncodeError", "decode", "encode"]

MAX_DEPTH = 100
_MOST_BITS = 12_000  # of an int: Python reads texts of up to 4300 digits
_EXACT = 1 << 53
_EXTENDED = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int4",
    "uint4",
)  # ml_dtypes, which comes with JAX


class EncodeError(TypeError):
    """A value that cannot be written. `.path` is its place, `a/0/b`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path or 'the value itself'}: {reason}")
        self.path = path


class DecodeError(ValueError):
    """What was read is not a value written by `encode`."""


def encode(value: Any, path: str = "", depth: int = 0) -> Any:
    """Returns `value` as JSON.

    Raises:
        EncodeError: for a value of another type, naming its path.
    """
    if depth > MAX_DEPTH:
        raise EncodeError(path, f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EncodeError(path, f"a text that is no Unicode ({error.reason})") from None
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic) and not isinstance(value, float | complex | str | bytes):
        return {"$scalar": _array(np.asarray(value), path)}
    if type(value) is int:
        if value.bit_length() > _MOST_BITS:
            raise EncodeError(path, f"an int of more than {_MOST_BITS} bits")
        return value if -_EXACT < value < _EXACT else {"$int": str(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is complex:
        return {"$complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, np.generic):
        return {"$scalar": _array(np.asarray(value), path)}
    if isinstance(value, np.ndarray):
        return {"$array": _array(value, path)}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {
                key: encode(item, f"{path}/{key}".lstrip("/"), depth + 1)
                for key, item in value.items()
            }
        pairs = []
        for key, item in value.items():
            inner = f"{path}/{key}".lstrip("/")
            if not isinstance(key, str | int | float | bytes | tuple | type(None)):
                raise EncodeError(inner, f"a key of type {type(key).__name__}")
            pairs.append([encode(key, inner, depth + 1), encode(item, inner, depth + 1)])
        return {"$dict": pairs}
    if type(value) is list or type(value) is tuple:
        items = [encode(item, f"{path}/{i}".lstrip("/"), depth + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    raise EncodeError(
        path,
        f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be written",
    )


def _array(value: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
    if value.dtype.kind == "V" and value.dtype.names is None and value.dtype.name in _EXTENDED:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.name, "shape": list(value.shape), "data": data}
    if value.dtype.kind not in "biufcSU" or value.dtype.hasobject:
        raise EncodeError(path, f"a numpy array of dtype {value.dtype} cannot be written")
    return {
        "dtype": value.dtype.newbyteorder("<").str,
        "shape": list(value.shape),
        "data": (
            base64.b64encode(
                np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
            ).decode()
        ),
    }


def decode(value: Any, depth: int = 0) -> Any:
    """Returns the value that `encode` wrote.

    Raises:
        DecodeError: for anything else.
    """
    if depth > 2 * MAX_DEPTH:
        raise DecodeError("nested too deep")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: decode(item, depth + 1) for key, item in value.items()}
    if len(value) != 1:
        raise DecodeError(f"an object with the tag {tags[0]} and other keys")
    tag, body = next(iter(value.items()))
    try:
        return _DECODERS[tag](body, depth + 1)
    except DecodeError:
        raise
    except Exception as error:  # whatever a damaged body makes of it, it is one kind of error
        raise DecodeError(f"{tag}: {error}") from error


def _extended(name: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def _decode_array(body: Any) -> np.ndarray[Any, Any]:
    dtype = _extended(body["dtype"]) if body["dtype"] in _EXTENDED else np.dtype(body["dtype"])
    if dtype.hasobject or (dtype.kind not in "biufcSU" and body["dtype"] not in _EXTENDED):
        raise DecodeError(f"dtype {dtype}")
    data = base64.b64decode(body["data"], validate=True)
    return np.frombuffer(data, dtype).reshape(tuple(int(n) for n in body["shape"])).copy()


def _decode_int(body: Any) -> int:
    if not isinstance(body, str) or len(body) > _MOST_BITS // 3:
        raise DecodeError("an int that is no short text")
    return int(body)


_DECODERS: dict[str, Any] = {
    "$int": lambda body, depth: _decode_int(body),
    "$float": lambda body, depth: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[body],
    "$complex": lambda body, depth: complex(decode(body[0], depth), decode(body[1], depth)),
    "$bytes": lambda body, depth: base64.b64decode(body, validate=True),
    "$tuple": lambda body, depth: tuple(decode(item, depth) for item in body),
    "$dict": lambda body, depth: {decode(key, depth): decode(item, depth) for key, item in body},
    "$array": lambda body, depth: _decode_array(body),
    "$scalar": lambda body, depth: _decode_array(body)[()],
}
