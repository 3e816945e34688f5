from concurrent.futures import ThreadPoolExecutor

import pytest

from neuroflow_hf.utils.files import new_folder, staging_folder, user_cache, write_whole


def test_many_may_write_one_file_at_once(tmp_path):
    path, contents = tmp_path / "folder" / "figures", [bytes([place]) * 100_000 for place in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(lambda content: [write_whole(path, content) for _ in range(20)], contents))
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "figures"
    write_whole(path, b"before")
    with pytest.raises(TypeError):
        write_whole(path, None)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_staged_files_replace_earlier_ones_and_leave_others(tmp_path):
    for name in ("first", "second", "mine"):
        (tmp_path / name).write_text("before")
    with staging_folder(tmp_path, ("first", "second")) as folder:
        for name in ("first", "more"):
            (folder / name).write_text("after")
        assert (tmp_path / "first").read_text() == "before"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "first": "after",
        "more": "after",
        "mine": "before",
    }


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "first").write_text("before")
    with pytest.raises(MemoryError), staging_folder(tmp_path, ("first",)) as folder:
        (folder / "first").write_text("after")
        raise MemoryError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), staging_folder(tmp_path / "out"):
        pass


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyError), new_folder(out) as folder:
        (folder / "first").write_text("half")
        raise KeyError
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "first").write_text("whole")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "first").read_text() == "whole"
    with pytest.raises(FileExistsError, match="not an empty folder"), new_folder(out):
        pytest.fail("begun")


def test_the_cache_is_the_users_own_or_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROFLOW_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("NEUROFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "neuroflow"
