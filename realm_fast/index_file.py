"""One safetensors file for an index: written as a stream, read in O(1) by mapping it, checked before it is
used.

The header ends on a page boundary, so that arrays are aligned when the file is mapped. Beside what
safetensors demands, its metadata carries `data_sha256`, the hash of everything after the header, and
`header_sha256`, the hash of the header's own content, which every load checks.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import atomic_file

_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 24
_MAX_HEADER_BYTES = 1 << 20
_NO_HASH = "0" * 64
_TYPES = {
    "F32": np.float32,
    "BF16": np.uint16,
    "U8": np.uint8,
    "I64": np.int64,
    "BOOL": np.bool_,
}


class Tensor:
    """A tensor to be written: its pieces are streamed one after the other."""

    def __init__(self, dtype: str, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
        self.dtype, self.shape, self.pieces = dtype, shape, pieces
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(_TYPES[dtype]).itemsize


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Writes the file atomically; extra memory does not grow with it.

    Raises:
        DiskFullError, DataError: it could not be written; what stood at `path` is untouched.
    """
    table: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        header = _header(metadata, table, _NO_HASH)
        file.write(header)
        for name, tensor in tensors.items():
            written = 0
            for piece in tensor.pieces:
                view = memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                for begin in range(0, len(view), _CHUNK_BYTES):
                    chunk = view[begin : begin + _CHUNK_BYTES]
                    digest.update(chunk)
                    file.write(chunk)
                written += len(view)
            if written != tensor.nbytes:
                raise AssertionError(f"{name}: {written} bytes written of {tensor.nbytes}")
        final = _header(metadata, table, digest.hexdigest())
        if len(final) != len(header):
            raise AssertionError("the header changed its length")
        file.seek(0)
        file.write(final)


def read(path: Path, kind: str, *, verify: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps the file's tensors (copy-on-write: the file never changes) and returns them with the metadata.

    Args:
        path: the file.
        kind: what its metadata must say it is.
        verify: also hash the data, which reads all of it.

    Raises:
        DataError: there is no such file.
        CorruptArtifactError: it is not a file of this kind, or not as it was written.
    """
    entries, metadata, data_begin, size = _read_header(path, kind)
    if size == data_begin:
        data = np.empty(0, np.uint8)
    else:
        # mmap.mmap would keep a descriptor for each mapping; an index of many shards would run out of them
        try:
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be mapped into memory ({error}).") from error
        data = mapped.numpy()[data_begin:]
    if verify:
        digest = hashlib.sha256()
        for begin in range(0, len(data), _CHUNK_BYTES):
            digest.update(data[begin : begin + _CHUNK_BYTES].data)
        if digest.hexdigest() != metadata["data_sha256"]:
            raise CorruptArtifactError(f"{path}: its data is not as it was written (wrong sha256).")
    return {
        name: data[begin:end].view(_TYPES[dtype]).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }, metadata


def read_metadata(path: Path, kind: str) -> dict[str, str]:
    """The file's metadata, in a time that does not depend on its size; raises what `read` raises."""
    return _read_header(path, kind)[1]


def _read_header(
    path: Path, kind: str
) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str], int, int]:
    """(tensors by name, metadata, where the data begins, the file's size), checked against each other."""
    if not path.is_file():
        raise DataError(f"{path}: the index file does not exist.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CorruptArtifactError(f"{path}: not an index file, or cut short ({size} bytes).")
        raw = file.read(length)
    try:
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise CorruptArtifactError(f"{path}: its header is damaged.") from None
    if metadata.get("kind") != kind:
        raise CorruptArtifactError(
            f"{path}: expected a {kind}, found {metadata.get('kind', 'something else')}."
        )
    if metadata.get("header_sha256") != _header_hash(metadata, table):
        raise CorruptArtifactError(f"{path}: its header is not as it was written.")
    data_begin = 8 + length
    expected = data_begin + max((end for _, _, _, end in entries.values()), default=0)
    if size != expected:
        raise CorruptArtifactError(f"{path}: {size} bytes, but its header says {expected}.")
    return entries, metadata, data_begin, size


def _header(metadata: Mapping[str, str], table: Mapping[str, object], data_sha256: str) -> bytes:
    metadata = {**metadata, "data_sha256": data_sha256}
    metadata["header_sha256"] = _header_hash(metadata, table)
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # safetensors allows spaces after the JSON
    return len(text).to_bytes(8, "little") + text


def _header_hash(metadata: Mapping[str, str], table: Mapping[str, object]) -> str:
    content = {name: value for name, value in metadata.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps([content, table], sort_keys=True).encode()).hexdigest()
