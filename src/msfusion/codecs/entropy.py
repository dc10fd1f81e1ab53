"""The last step of some codecs: a general-purpose compressor over their codes.

Neighbouring codes have little in common but how frequent they are, so nearly all of the gain is in the Huffman coder.
For codes packed into bytes level 1 of Zstandard is enough. Codes of a byte each gain 4 to 21 % by DEFLATE that does not
look for repetitions, or for runs alone: those that Zstandard finds cost more than they save.
"""

from __future__ import annotations

import zlib
from typing import Any

from msfusion.codecs.header import Buffer
from msfusion.errors import CodecError
from msfusion.extras import needing

LEVEL = 1
MOST_MEMORY = 9
TRIED = 2**18
"""How many codes show which way of coding is the shorter."""


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


def deflated(codes: Any) -> bytes:
    """A raw DEFLATE stream of codes of a byte each, whether it is smaller than they are or not.

    Runs pay where most codes are the same: what is shorter for the first codes is done with all.
    """
    view = memoryview(codes).cast("B")
    tried = {each: _deflated(view[:TRIED], each) for each in (zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)}
    strategy, stream = min(tried.items(), key=lambda each: len(each[1]))
    return stream if len(view) <= TRIED else _deflated(view, strategy)


def inflate(stream: Buffer, size: int) -> bytes:
    """The `size` bytes of a raw DEFLATE stream; no more than one beyond them is ever made.

    Raises CodecError for anything that is not one whole stream of that size.
    """
    reader = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        data = reader.decompress(stream, size + 1)
    except zlib.error as error:
        raise CodecError(f"a compressed payload is damaged: {error}.") from error
    if len(data) != size or not reader.eof or reader.unused_data:
        raise CodecError("a compressed payload is damaged: it holds another size than its header.")
    return data


def _deflated(codes: memoryview, strategy: int) -> bytes:
    writer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, MOST_MEMORY, strategy)
    return writer.compress(codes) + writer.flush()


def _zstandard() -> Any:
    with needing("codecs", "entropy = 'zstd'"):
        import zstandard
    return zstandard
