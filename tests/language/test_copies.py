"""Code that both families need is a copy in each, since saved models take their files from one folder."""

import inspect

import pytest

from neuroflow_hf.language import options, plain
from neuroflow_hf.vision import options as vision_options
from neuroflow_hf.vision import shortcuts


@pytest.mark.parametrize(
    "original, copy", [(vision_options.make_options, options.make_options), (shortcuts.are_plain, plain.are_plain)]
)
def test_copies_are_equal(original, copy):
    assert inspect.getsource(original) == inspect.getsource(copy)
