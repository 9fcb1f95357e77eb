"""The demo's text: what is taken, what is held out, and what Megatron reads back."""

from pathlib import Path

import pytest

from megatron_growth.demo.data import END_OF_DOCUMENT, Document, pieces, prepare, read_documents
from megatron_growth.demo.settings import FULL, MICRO_BATCH, QUICK, SEQ_LENGTH, Settings
from megatron_growth.errors import GrowthError

HELDOUT_TOKENS = 500


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A source tree with everything that matters, and with what must be left out."""
    root = tmp_path / "lib"
    for number in range(100):
        _write(root / f"package{number % 3}" / f"module{number}.py", f"x = {number}\n" * 20)
    _write(root / "test" / "test_module.py", "left out")
    _write(root / "package0" / "tests" / "test_module.py", "left out")
    _write(root / "site-packages" / "other.py", "left out")
    _write(root / "empty.py", "")
    _write(root / "notes.txt", "left out")
    (root / "latin.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _documents(prefix: Path) -> list[bytes]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [bytes(dataset[index].astype("uint8")) for index in range(len(dataset))]


def test_only_the_utf8_source_outside_test_suites_is_read_in_the_order_of_names(
    library: Path,
) -> None:
    names = [document.name for document in read_documents(library)]
    assert names == sorted(f"package{number % 3}/module{number}.py" for number in range(100))


def test_the_side_of_a_file_goes_by_its_name_alone() -> None:
    names = [f"package/module{number}.py" for number in range(2000)]
    sides = [Document(name, b"one").held_out for name in names]
    assert sides == [Document(name, b"other").held_out for name in names]
    assert 0.08 < sum(sides) / len(sides) < 0.12


def test_megatron_reads_back_every_training_file_and_none_that_is_held_out(
    library: Path, tmp_path: Path
) -> None:
    corpus = prepare(tmp_path / "data", HELDOUT_TOKENS, library)
    documents = list(read_documents(library))
    kept = [document.text for document in documents if not document.held_out]
    train = _documents(corpus.train)
    assert train == [text + bytes([END_OF_DOCUMENT]) for text in kept]
    assert corpus.train_documents == len(train) > 80
    assert corpus.train_tokens == sum(map(len, train))
    heldout = _documents(corpus.heldout)
    assert corpus.heldout_tokens == sum(map(len, heldout)) == HELDOUT_TOKENS
    assert len(heldout) == corpus.heldout_documents > 1
    sources = [document.text for document in documents if document.held_out]
    assert all(piece[:-1] in text for piece, text in zip(heldout, sources, strict=False))


def test_the_same_tree_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        prepare(tmp_path / name, HELDOUT_TOKENS, library)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["heldout.bin", "heldout.idx", "train.bin", "train.idx"]
    for name in files:
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("num_tokens", [1, 2, 1024, 1025, 1026, 1027, 2500])
def test_pieces_come_from_the_middle_and_make_the_number_of_tokens_asked_for(
    num_tokens: int,
) -> None:
    texts = [bytes([letter]) * 400 + b"middle" * 200 + bytes([letter]) * 400 for letter in b"abc"]
    taken = list(pieces(texts, num_tokens))
    assert sum(len(piece) + 1 for piece in taken) == num_tokens
    assert all(set(piece) <= set(b"middle") for piece in taken)


def test_too_little_text_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GrowthError, match=r"holds 100 Python files.*of the 1000000 held-out tokens"
    ):
        prepare(tmp_path / "data", 1_000_000, library)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_held_out_sets_are_whole_micro_batches_and_no_step_is_measured_twice(
    settings: Settings,
) -> None:
    assert settings.heldout_samples % (2 * MICRO_BATCH) == 0
    assert settings.heldout_tokens == settings.heldout_samples * SEQ_LENGTH + 1
    assert settings.base_steps % settings.base_interval != 0
    assert settings.base_steps % settings.extra_interval == 0
    assert settings.extra_steps % settings.extra_interval != 0
