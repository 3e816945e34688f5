"""Files written whole: by many at once, and not at all after an error."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from neuroflow_hf.utils.provenance import write_whole_bytes


def test_many_may_write_one_file_at_once(tmp_path):
    path, contents = tmp_path / "folder" / "figures", [bytes([place]) * 100_000 for place in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(lambda content: [write_whole_bytes(path, content) for _ in range(20)], contents))
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "figures"
    write_whole_bytes(path, b"before")
    with pytest.raises(TypeError):
        write_whole_bytes(path, "no bytes")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
