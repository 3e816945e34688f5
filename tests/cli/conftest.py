import pytest

from tests.phi3_models import make_chat_tokenizer, save_checkpoint


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory):
    """A tiny checkpoint with its tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("phi3"), num_hidden_layers=5)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A tiny checkpoint whose tokenizer has a chat template."""
    return save_checkpoint(tmp_path_factory.mktemp("chat"), make_chat_tokenizer(), num_hidden_layers=5)
