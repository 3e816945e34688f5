"""Wheels are kept only with the right hash, and a failed download says what to do."""

import hashlib
from pathlib import Path

import pytest

from neuroflow_hf.utils import wheels
from neuroflow_hf.utils.wheels import WheelPin, fetch_wheel, run_pip

CONTENT = b"a wheel"
PIN = WheelPin("img-thing", "0.1.1", "img_thing-0.1.1-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), 90)


def pip_that_leaves(content):
    """A pip that downloads a file with this content."""

    def run(arguments, temporary):
        (Path(arguments[arguments.index("--dest") + 1]) / PIN.filename).write_bytes(content)
        return 0, ""

    return run


def test_a_wheel_is_downloaded_once_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "run_pip", pip_that_leaves(CONTENT))
    said = []
    for _ in range(2):
        path = fetch_wheel(PIN, tmp_path / "kept", said.append)
        assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert len(said) == 1 and "img-thing 0.1.1 (90 MB)" in said[0] and str(tmp_path / "kept") in said[0]


def test_wrong_hash_names_file_expected_and_way_out(tmp_path):
    (tmp_path / PIN.filename).write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=f"expected {PIN.sha256}.*Delete the file"):
        fetch_wheel(PIN, tmp_path, pytest.fail)


def test_download_with_a_wrong_hash_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "run_pip", pip_that_leaves(b"half a wheel"))
    with pytest.raises(ValueError, match="SHA-256"):
        fetch_wheel(PIN, tmp_path, str)
    assert list(tmp_path.iterdir()) == []


def test_without_network_the_error_says_which_wheel_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "run_pip", lambda *_: (1, "ERROR: no matching distribution"))
    with pytest.raises(RuntimeError) as caught:
        fetch_wheel(PIN, tmp_path, str)
    message = str(caught.value)
    assert str(tmp_path / PIN.filename) in message
    assert "img-thing==0.1.1" in message
    assert "no matching distribution" in message


def test_pip_runs_and_what_it_says_is_kept(tmp_path):
    code, said = run_pip(["download", "--no-index", "--dest", str(tmp_path), "img-thing"], tmp_path)
    assert code == 1 and "img-thing" in said
