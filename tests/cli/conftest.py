import pytest

from tests.phi3_models import make_ours, make_tokenizer


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory):
    """A tiny checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("phi3")
    make_ours(num_hidden_layers=5, vocab_size=30).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
