from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from pipekit.data.megatron import IndexedTokensWriter, TokenSlice, take_documents
from pipekit.data.statistics import find_duplicates, measure_lengths, take_excerpts


def write(path: Path, documents: list[list[int]]) -> TokenSlice:
    with IndexedTokensWriter(path, vocab_size=100) as writer:
        for document in documents:
            writer.write(np.array(document, dtype=np.int64))
            writer.end_document()
    return take_documents(path)


def test_lengths_are_those_of_a_count_by_hand(tmp_path: Path) -> None:
    draw = random.Random(1)
    sizes = [draw.choice([1, 2, 3, 4, 8, 15, 100, 1023, 1024]) for _ in range(200)]
    lengths = measure_lengths(write(tmp_path / "a.bin", [[7] * size for size in sizes]))
    assert lengths is not None
    assert (lengths.shortest, lengths.longest) == (min(sizes), max(sizes))
    assert lengths.mean == sum(sizes) / len(sizes)
    assert lengths.median == sorted(sizes)[99:101][0] == np.median(sizes)
    for bin in lengths.histogram:
        assert bin.num_documents == sum(bin.low <= size <= bin.high for size in sizes)
    assert sum(bin.num_documents for bin in lengths.histogram) == 200
    assert [bin.low for bin in lengths.histogram] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def test_empty_documents_are_counted_and_none_have_no_lengths(tmp_path: Path) -> None:
    lengths = measure_lengths(write(tmp_path / "a.bin", [[], [1], []]))
    assert lengths is not None
    assert [(bin.low, bin.high, bin.num_documents) for bin in lengths.histogram] == [(0, 0, 2), (1, 1, 1)]
    assert measure_lengths(write(tmp_path / "b.bin", [])) is None


def test_duplicates_are_those_of_a_comparison_of_each_with_each(tmp_path: Path) -> None:
    draw = random.Random(2)
    documents = [[draw.randrange(2) for _ in range(draw.randrange(5))] for _ in range(60)]
    held_out = [[draw.randrange(3) for _ in range(3)] for _ in range(20)]
    found = find_duplicates(write(tmp_path / "a.bin", documents), write(tmp_path / "b.bin", held_out))
    repeats = [document for index, document in enumerate(documents) if document in documents[:index]]
    assert (found.num_documents, found.num_tokens) == (len(repeats), sum(map(len, repeats)))
    assert found.most_repeated == max(map(documents.count, documents))
    most = documents[found.most_repeated_document]
    assert documents.count(most) == found.most_repeated
    assert documents.index(most) == found.most_repeated_document
    assert found.num_held_out_in_training == sum(document in documents for document in held_out)


def test_nothing_is_repeated_where_there_is_nothing(tmp_path: Path) -> None:
    found = find_duplicates(write(tmp_path / "a.bin", []), None)
    assert (found.num_documents, found.most_repeated, found.num_held_out_in_training) == (0, 0, 0)


def test_excerpts_are_beginnings_of_documents_all_over_the_slice(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [[index] * (index + 1) for index in range(20)])
    excerpts = take_excerpts(take_documents(tmp_path / "a.bin", 10, 10), 3, max_tokens=14)
    assert [excerpt.document for excerpt in excerpts] == [0, 3, 6]
    assert [excerpt.token_ids for excerpt in excerpts] == [(10,) * 11, (13,) * 14, (16,) * 14]
    assert [excerpt.num_tokens for excerpt in excerpts] == [11, 14, 17]
    assert len(take_excerpts(take_documents(tmp_path / "a.bin", 0, 2), 5, max_tokens=1)) == 2
