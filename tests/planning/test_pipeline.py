"""What lies on a pipeline rank, and how much waits there."""

import pytest

from megatron_growth.planning.pipeline import chunks_of, even_layout, parsed_layout


def waiting(rank, virtual, microbatches=64, **options):
    layout = even_layout(16, 0, 4 * virtual)
    return [c.waiting for c in chunks_of(rank, layout, 4, microbatches, **options)]


def test_layers_are_divided_as_evenly_as_they_go():
    assert even_layout(5, 1, 2) == ("Ettt", "ttmL")
    assert even_layout(4, 0, 1) == ("EttttL",)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("Ett|ttL", ("Ett", "ttL")),
        ("Et*3|(tt|)*2,m|L", ("Ettt", "tt", "tt", "m", "L")),
        ("Et*2|(tt|)*5t|tmL", ("Ett", "tt", "tt", "tt", "tt", "tt", "t", "tmL")),
    ],
)
def test_megatrons_notation_is_read(text, chunks):
    assert parsed_layout(text) == chunks


def test_a_letter_that_megatron_does_not_know_is_refused():
    with pytest.raises(ValueError, match="'x' is none of EtmL"):
        parsed_layout("Etx|L")


def test_a_rank_holds_every_pipeline_th_chunk():
    first, second = chunks_of(1, parsed_layout("Ett|t|tt|tmL"), 2, 8)
    assert (first.layers, first.embedding, first.output) == ((2,), False, False)
    assert (second.layers, second.modules, second.output) == ((5,), (0,), True)


def test_one_forward_one_backward_lets_in_fewer_towards_the_end():
    assert [waiting(rank, 1) for rank in range(4)] == [[4], [3], [2], [1]]
    assert waiting(0, 1, microbatches=2) == [2]


def test_interleaving_lets_in_a_group_for_each_chunk_and_some_more():
    assert waiting(0, 2) == [7, 4]  # 2 x 3 + 4 + 1 passes, in groups of four
    assert waiting(3, 2) == [4, 1]
    assert waiting(3, 2, overlap=True) == [4, 2]
    assert waiting(0, 2, microbatches=4) == [4, 4]
