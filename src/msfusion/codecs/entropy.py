"""The last step of some codecs: a general-purpose compressor over the packed codes.

Level 1 of Zstandard is enough: nearly all of the gain is in its Huffman coder, because neighbouring codes have
little in common but how frequent they are.
"""

from __future__ import annotations

from typing import Any

from msfusion.codecs.header import Buffer
from msfusion.errors import CodecError, ConfigError

LEVEL = 1


def compress(data: Any) -> bytes | None:
    """A Zstandard frame that is smaller than `data` (anything contiguous), or None where there is none.

    Raises ConfigError where the package `zstandard` is not installed.
    """
    frame = bytes(_zstandard().ZstdCompressor(level=LEVEL, write_content_size=True).compress(data))
    return frame if len(frame) < memoryview(data).nbytes else None


def decompress(frame: Buffer, size: int) -> bytes:
    """The `size` bytes of a frame. Raises CodecError for anything that is not one whole frame of that size.

    The size that a frame declares is compared before anything is allocated.
    """
    zstandard = _zstandard()
    try:
        if zstandard.frame_content_size(frame) != size:
            raise CodecError("a compressed payload is damaged: it declares another size than its header.")
        return bytes(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise CodecError(f"a compressed payload is damaged: {error}.") from error


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            "entropy = 'zstd' needs the package zstandard: pip install 'msfusion[codecs]'."
        ) from error
    return zstandard
