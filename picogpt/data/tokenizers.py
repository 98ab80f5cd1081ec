"""The interface of tokenizers, and the character tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from picogpt.errors import PicogptError, UsageError
from picogpt.files import read_text, write_text

FILE_NAME = "tokenizer.json"
FORMAT = {"format": "picogpt-char-tokenizer", "version": 1}


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Number of distinct tokens."""
    sha256: str
    """Identity of the vocabulary: equal hashes give equal ids."""
    end_of_text: int | None
    """The id that ends a document; None if the vocabulary has none."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids. Raises UsageError when the text has characters that the vocabulary lacks."""

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of token ids."""

    def decode_bytes(self, ids: np.ndarray | list[int]) -> bytes:
        """UTF-8 bytes of token ids; a token may end inside a character."""

    def count_bytes(self, ids: np.ndarray) -> int:
        """Length in UTF-8 of the text of token ids; one that ends a document has none, because it is in no text."""


class CharTokenizer:
    """One token per character; ids in the order of the code points."""

    end_of_text: int | None = None

    def __init__(self, characters: str):
        if not characters or list(characters) != sorted(set(characters)):
            raise PicogptError("a character tokenizer needs distinct characters in the order of their code points")
        self.characters, self.vocab_size = characters, len(characters)
        self.sha256 = hashlib.sha256(characters.encode()).hexdigest()
        self._points = _code_points(characters)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of all characters in `text`. Raises PicogptError when there are fewer than two."""
        characters = "".join(sorted(set(text)))
        if len(characters) < 2:
            raise PicogptError(f"the corpus holds only the character {characters!r}: there is nothing to predict")
        return cls(characters)

    @classmethod
    def load(cls, folder: str | Path) -> CharTokenizer:
        """Read `tokenizer.json` in `folder`. Raises PicogptError when it is missing or not one."""
        path = Path(folder) / FILE_NAME
        try:
            tree = json.loads(read_text(path))
            if (found := {key: tree[key] for key in FORMAT}) != FORMAT:
                raise ValueError(f"it has {found}, and this picogpt reads {FORMAT}")
            return cls("".join(tree["characters"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PicogptError(
                f"{path} is not a character tokenizer ({error}): picogpt tokenize char makes one"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder`."""
        tree = json.dumps({**FORMAT, "characters": list(self.characters)}, indent=1)
        write_text(Path(folder) / FILE_NAME, tree + "\n")

    def encode(self, text: str) -> np.ndarray:
        """Token ids, shape (len(text),), of the smallest unsigned dtype.

        Raises UsageError naming the characters that the vocabulary lacks.
        """
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            lacking = " ".join(repr(chr(point)) for point in np.unique(points[unknown])[:10])
            where = f"(first at position {unknown.argmax()})"
            raise UsageError(f"the vocabulary lacks {lacking} {where}; it has the characters {self.characters!r}")
        return ids.astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of token ids."""
        return "".join(self.characters[int(index)] for index in ids)

    def decode_bytes(self, ids: np.ndarray | list[int]) -> bytes:
        """UTF-8 of the text of token ids."""
        return self.decode(ids).encode()

    def count_bytes(self, ids: np.ndarray) -> int:
        """Length in UTF-8 of the text of token ids."""
        return int(np.array([len(character.encode()) for character in self.characters])[ids].sum())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
