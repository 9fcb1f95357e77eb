"""Real text that every machine has: the source of Python's standard library, a token for each byte.

The files are read in the order of their names, so the data is a function of the Python version
alone. Test suites are left out, for not every installation has them, and so are tables that are
text in name only. Byte 255 stands in no UTF-8 text; here it ends a document. It is the last of 256
tokens, which is where Megatron's `NullTokenizer` expects the end of a document.

Which files are held out goes by a hash of their names. Of each, a piece from its middle is taken,
so that the held-out set is small, is read whole at every evaluation, and still speaks for many
files.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_growth.errors import GrowthError
from megatron_growth.quiet import quiet

VOCABULARY = 256
END_OF_DOCUMENT = 255

_INSTALLED = {"site-packages", "dist-packages"}
_TESTS = {"test", "tests", "idle_test"}
_TABLES = {"encodings", "pydoc_data"}
_LEFT_OUT = frozenset(_INSTALLED | _TESTS | _TABLES)
_HELDOUT_SHARE = 0.1
_PIECE = 1024  # bytes of a held-out file


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str
    """Path below the standard library, with forward slashes."""

    text: bytes
    """Its bytes, without an end of document."""

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that no file changes sides when others come or go."""
        first = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")
        return first < _HELDOUT_SHARE * 2**32


@dataclass(frozen=True)
class Corpus:
    """The two datasets on disk, by the prefix of their `.bin` and `.idx` files."""

    train: Path
    heldout: Path
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int


def prepare(directory: Path, heldout_tokens: int, library: Path | None = None) -> Corpus:
    """Write the training and the held-out dataset.

    Args:
        directory: where to.
        heldout_tokens: size of the held-out set, ends of documents counted.
        library: the source tree to read, this Python's standard library by default.

    Raises:
        GrowthError: the library holds too little text.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    documents = list(read_documents(library))
    train = [document.text for document in documents if not document.held_out]
    kept_back = (document.text for document in documents if document.held_out)
    heldout = list(pieces(kept_back, heldout_tokens))
    found = sum(map(_num_tokens, heldout))
    if not train or found < heldout_tokens:
        raise GrowthError(
            f"{str(library)!r} holds {len(documents)} Python files, and {found} of the "
            f"{heldout_tokens} held-out tokens that the demo needs; run it with a Python that has "
            "the source of its standard library"
        )
    directory.mkdir(parents=True, exist_ok=True)
    return Corpus(
        train=directory / "train",
        heldout=directory / "heldout",
        train_tokens=write_dataset(directory / "train", train),
        heldout_tokens=write_dataset(directory / "heldout", heldout),
        train_documents=len(train),
        heldout_documents=len(heldout),
    )


def read_documents(library: Path) -> Iterator[Document]:
    """The Python files below a directory, in the order of their names, that are UTF-8 text."""
    paths = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")}
    for name in sorted(paths):
        if _LEFT_OUT.isdisjoint(name.split("/")[:-1]):
            text = paths[name].read_bytes()
            if text and _is_utf8(text):
                yield Document(name, text)


def pieces(texts: Iterable[bytes], num_tokens: int) -> Iterator[bytes]:
    """A piece from the middle of each text, until there are that many tokens, the last cut to fit.

    A piece of n bytes makes n + 1 tokens, its end of document counted.
    """
    left = num_tokens
    for text in texts:
        if left == 0:
            return
        start = max(0, (len(text) - _PIECE) // 2)
        piece = text[start : start + min(_PIECE, left - 1)]
        yield piece
        left -= _num_tokens(piece)


def write_dataset(prefix: Path, texts: Iterable[bytes]) -> int:
    """Write Megatron's indexed dataset, one document for each text; returns its size in tokens."""
    import numpy
    import torch

    with quiet():
        from megatron.core.datasets import indexed_dataset

    binary = indexed_dataset.get_bin_path(str(prefix))
    builder = indexed_dataset.IndexedDatasetBuilder(binary, dtype=numpy.uint8)
    total = 0
    for text in texts:
        tokens = torch.frombuffer(bytearray([*text, END_OF_DOCUMENT]), dtype=torch.uint8)
        builder.add_item(tokens)
        builder.end_document()
        total += _num_tokens(text)
    builder.finalize(indexed_dataset.get_idx_path(str(prefix)))
    return total


def _num_tokens(text: bytes) -> int:
    return len(text) + 1


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    # python -m megatron_growth.demo.data DIRECTORY
    import sys

    prepare(Path(sys.argv[1]), heldout_tokens=128 * 256 + 1)
