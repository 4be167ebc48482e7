"""Values as tagged JSON and back: what data positions and inline leaves are written as. Never
pickle.

JSON itself carries None, bool, str, finite floats, lists, dicts with string keys, and ints of up to
53 bits. Everything else is an object with the single key `$` + tag: tuples, bytes, dicts with other
keys, big ints, non-finite floats, numpy arrays, torch tensors and typed PRNG keys. A dict that has
a key beginning with `$` is tagged too, so that nothing can be mistaken for a tag.

The bytes of arrays stand in the JSON as base64, or, when they are many and the caller takes them,
beside it as a blob: `{"blob": n}`.

What is decoded is not trusted. A tag names one of the kinds here, never a class or a module; depth,
sizes and types are checked before anything is made of them.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "DecodeError",
    "EncodeError",
    "Encoded",
    "check_keys",
    "decode",
    "encode",
    "pack",
    "unpack",
]

MAX_DEPTH = 100
_MOST_BITS = 12_000  # of an int: Python reads texts of up to 4300 digits
_MOST_ALIKE = 100  # keys with one hash: a dict compares each with all of them
_EXACT = 1 << 53
_BLOB_BYTES = 512  # fewer are shorter in the JSON than beside it
_EXTENDED = (  # ml_dtypes, which comes with JAX
    *("bfloat16", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int2", "int4", "uint4"),
)
_NUMPY_DTYPE = re.compile(r"[<|][biufcSU][0-9]{1,9}")
_TORCH_DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)


class EncodeError(TypeError):
    """A value that cannot be written. `.path` is its place, `a/0/b`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path or 'the value itself'}: {reason}")
        self.path = path


class DecodeError(ValueError):
    """What was read is not a value written by `encode`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as JSON, and the blobs that it refers to. It shares nothing with the value."""

    value: Any
    blobs: Sequence[bytes] = ()


def pack(value: Any) -> Encoded:
    """Returns `value` with the bytes of its arrays beside the JSON.

    Raises:
        EncodeError: for a value of another type, naming its path.
    """
    blobs: list[bytes] = []
    return Encoded(encode(value, blobs=blobs), tuple(blobs))


def unpack(encoded: Encoded) -> Any:
    """Returns the value that `pack` was given.

    Raises:
        DecodeError: for anything else.
    """
    return decode(encoded.value, blobs=encoded.blobs)


def encode(value: Any, path: str = "", depth: int = 0, *, blobs: list[bytes] | None = None) -> Any:
    """Returns `value` as JSON. Large bytes are appended to `blobs`, when there is such a list.

    Raises:
        EncodeError: for a value of another type, naming its path.
    """
    if depth > MAX_DEPTH:
        raise EncodeError(path, f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, np.generic):  # before str, float and bytes, which some of them are too
        return {"$scalar": _array(np.asarray(value), path, blobs)}
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EncodeError(path, f"a text that is no Unicode ({error.reason})") from None
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        if value.bit_length() > _MOST_BITS:
            raise EncodeError(path, f"an int of more than {_MOST_BITS} bits")
        return value if -_EXACT < value < _EXACT else {"$int": str(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is complex:
        return {"$complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, bytes | bytearray):
        tag = "$bytearray" if isinstance(value, bytearray) else "$bytes"
        return {tag: _bytes(bytes(value), blobs)}
    if type(value) in (np.ndarray, np.memmap):  # others, masked ones say, mean more than this
        return {"$array": _array(value, path, blobs)}
    if isinstance(value, Mapping):
        return _mapping(value, path, depth, blobs)
    if type(value) is list or type(value) is tuple:
        items = [
            encode(item, f"{path}/{i}".lstrip("/"), depth + 1, blobs=blobs)
            for i, item in enumerate(value)
        ]
        return items if type(value) is list else {"$tuple": items}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        return {"$torch": _tensor(value, path, blobs, torch)}
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(value, getattr(jax, "Array", ())):
        return _jax_array(value, path, blobs)
    raise EncodeError(
        path,
        f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be written",
    )


def _mapping(value: Mapping[Any, Any], path: str, depth: int, blobs: list[bytes] | None) -> Any:
    plain = all(type(key) is str and not key.startswith("$") for key in value)
    if plain and list(value) == sorted(value):  # JSON of ours has no other order
        return {
            key: encode(item, f"{path}/{key}".lstrip("/"), depth + 1, blobs=blobs)
            for key, item in value.items()
        }
    pairs = []
    for key, item in value.items():
        inner = f"{path}/{key}".lstrip("/")
        if not isinstance(key, str | int | float | bytes | tuple | type(None)):
            raise EncodeError(inner, f"a key of type {type(key).__name__}")
        pairs.append(
            [encode(key, inner, depth + 1), encode(item, inner, depth + 1, blobs=blobs)],
        )
    return {"$dict": pairs}


def _bytes(data: bytes, blobs: list[bytes] | None) -> Any:
    if blobs is None or len(data) < _BLOB_BYTES:
        return base64.b64encode(data).decode()
    blobs.append(data)
    return {"blob": len(blobs) - 1}


def _array(value: np.ndarray[Any, Any], path: str, blobs: list[bytes] | None) -> dict[str, Any]:
    if not value.dtype.itemsize and value.dtype.kind in "SU":
        value = value.astype(f"{value.dtype.kind}1")  # of empty texts only
    if value.dtype.names is None and value.dtype.name in _EXTENDED:
        data, name = np.ascontiguousarray(value).tobytes(), value.dtype.name
    elif value.dtype.kind not in "biufcSU" or value.dtype.hasobject or not value.dtype.itemsize:
        raise EncodeError(path, f"a numpy array of dtype {value.dtype} cannot be written")
    else:
        little = value.dtype.newbyteorder("<")
        data, name = np.ascontiguousarray(value, little).tobytes(), little.str
    return {"dtype": name, "shape": list(value.shape), "data": _bytes(data, blobs)}


def _tensor(value: Any, path: str, blobs: list[bytes] | None, torch: Any) -> dict[str, Any]:
    name = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided or name not in _TORCH_DTYPES:
        raise EncodeError(path, f"a {value.layout} tensor of dtype {name} cannot be written")
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return {"dtype": name, "shape": list(value.shape), "data": _bytes(data, blobs)}


def _jax_array(value: Any, path: str, blobs: list[bytes] | None) -> dict[str, Any]:
    """A `jax.Array` becomes a numpy array, a typed PRNG key stays one."""
    if not getattr(value, "is_fully_addressable", True):
        raise EncodeError(
            path, "an array that is spread over several hosts; keep it in `state`, not in `data`"
        )
    if str(value.dtype).startswith("key<"):
        import jax

        data = np.asarray(jax.random.key_data(value))
        return {"$key": {"impl": str(jax.random.key_impl(value)), "data": _array(data, path, None)}}
    return {"$array": _array(np.asarray(value), path, blobs)}


def decode(value: Any, depth: int = 0, *, blobs: Sequence[bytes] = ()) -> Any:
    """Returns the value that `encode` wrote.

    Raises:
        DecodeError: for anything else.
    """
    decoder = _Decoder(blobs)
    found = decoder.value(value, depth)
    if decoder.used != len(blobs):
        raise DecodeError(f"{len(blobs)} blobs, of which {decoder.used} are used")
    return found


class _Decoder:
    def __init__(self, blobs: Sequence[bytes]) -> None:
        self._blobs = blobs
        self.used = 0

    def value(self, value: Any, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH:
            raise DecodeError("nested too deep")
        if isinstance(value, list):
            return [self.value(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        tags = [key for key in value if key.startswith("$")]
        if not tags:
            return {key: self.value(item, depth + 1) for key, item in value.items()}
        if len(value) != 1:
            raise DecodeError(f"an object with the tag {tags[0][:20]} and other keys")
        [(tag, body)] = value.items()
        try:
            return self._tagged(tag, body, depth + 1)
        except DecodeError:
            raise
        except Exception as error:  # whatever a damaged body makes of it, it is one kind of error
            raise DecodeError(f"{tag[:20]}: {error}") from error

    def _tagged(self, tag: str, body: Any, depth: int) -> Any:
        match tag:
            case "$int":
                return _decode_int(body)
            case "$float":
                return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[body]
            case "$complex":
                real, imaginary = (self.value(part, depth) for part in body)
                return complex(real, imaginary)
            case "$bytes":
                return self._bytes(body)
            case "$bytearray":
                return bytearray(self._bytes(body))
            case "$tuple" if isinstance(body, list):
                return tuple(self.value(item, depth) for item in body)
            case "$dict" if isinstance(body, list):
                pairs = [(self.value(key, depth), self.value(item, depth)) for key, item in body]
                check_keys(key for key, _ in pairs)
                return dict(pairs)
            case "$array":
                return self._array(body)
            case "$scalar":
                return self._array(body)[()]
            case "$torch":
                return self._tensor(body)
            case "$key":
                return self._key(body)
        raise DecodeError(f"an unknown tag, {tag[:20]!r}, or not its body")

    def _bytes(self, body: Any) -> bytes:
        if isinstance(body, dict):
            number = body["blob"]
            # Each once, in their order: or a small file could say that it is a huge one.
            if type(number) is not int or number != self.used or number >= len(self._blobs):
                raise DecodeError("a blob that is not there, or not the next one")
            self.used += 1
            return self._blobs[number]
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise DecodeError(f"no base64: {error}") from None

    def _array(self, body: Any) -> np.ndarray[Any, Any]:
        name = body["dtype"]
        if name in _EXTENDED:
            import ml_dtypes

            dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        elif isinstance(name, str) and _NUMPY_DTYPE.fullmatch(name):
            dtype = np.dtype(name)
        else:
            raise DecodeError(f"the dtype {str(name)[:20]!r}")
        data = self._bytes(body["data"])
        shape = _decode_shape(body["shape"], len(data), dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape).copy()

    def _tensor(self, body: Any) -> Any:
        if body["dtype"] not in _TORCH_DTYPES:
            raise DecodeError(f"the torch dtype {str(body['dtype'])[:20]!r}")
        try:
            import torch  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise DecodeError(
                f"it holds a torch tensor, and torch cannot be imported: {error}"
            ) from None
        dtype = getattr(torch, body["dtype"])
        data = self._bytes(body["data"])
        shape = _decode_shape(body["shape"], len(data), torch.empty((), dtype=dtype).element_size())
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape).clone()

    def _key(self, body: Any) -> Any:
        import jax

        if not isinstance(body["impl"], str):
            raise DecodeError("a PRNG key of no kind")
        data: Any = self._array(body["data"])
        return jax.random.wrap_key_data(data, impl=body["impl"])


def check_keys(keys: Iterable[Any]) -> None:
    """Raises `DecodeError` for keys of which too many have one hash, before a dict or a set is made
    of them: that would take the square of their number. All multiples of `2**61 - 1` hash to 0.
    """
    keys = [key for key in keys if not isinstance(key, str | bytes)]
    if len(keys) <= _MOST_ALIKE:
        return
    # Counted as texts: the hashes of these nobody can choose.
    alike = Counter(str(hash(key)) for key in keys)
    if max(alike.values()) > _MOST_ALIKE:
        raise DecodeError("keys of a dict that were made to have the same hash")


def _decode_shape(shape: Any, size: int, itemsize: int) -> tuple[int, ...]:
    """Returns a shape when it is one of `size` bytes: no more memory than what was read."""
    # All numbers, before they are multiplied: a text times a number is a text as long as that says.
    is_list = isinstance(shape, list) and len(shape) <= 64
    if not is_list or any(type(n) is not int or n < 0 for n in shape):
        raise DecodeError("no shape")
    if math.prod(shape) * itemsize != size:
        raise DecodeError(f"{size} bytes for the shape {str(shape)[:80]}")
    return tuple(shape)


def _decode_int(body: Any) -> int:
    if not isinstance(body, str) or not re.fullmatch(r"-?[0-9]{1,3999}", body):
        raise DecodeError("an int that is no short text")
    return int(body)
