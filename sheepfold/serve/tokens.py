"""What single tokens are as bytes and as text, which decoding them one by one does not tell.

A byte-level token may be part of a character, and a sentencepiece token loses its leading space when decoded alone.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Any


class TokenBytes:
    """The bytes of every token of a tokenizer, looked up once each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = decoder is not None and b'"ByteLevel"' in bytes(decoder.__getstate__())
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """Return a token's bytes; none for an id that the tokenizer does not know."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """Return a token's text; part of a character is written as OpenAI does, bytes:\\xe2\\x82."""
        own = self.of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def offsets(self, tokens: Iterable[int], start: int = 0) -> Iterator[int]:
        """Yield where each token begins in the text that all of them make, in characters."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield start
            start += len(decoder.decode(self.of(token)))

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_BYTES[letter] for letter in piece)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(byte[1], 16)])
        return str(piece).replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """Return the letter that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_letters()
