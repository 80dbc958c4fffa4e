"""Sentence encoders: a real one of sentence-transformers where that extra is installed, and one that cannot be had."""

import string
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ckd_fed.data.encoders import encode, find_encoder
from ckd_fed.errors import DataError

TEXTS = ["a red toy", "", "bottle with a cap", "a red toy"]


@pytest.fixture
def saved_model(tmp_path):
    """The folder of a sentence encoder with random weights, 32-d."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    letters = [*string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    models = pytest.importorskip("sentence_transformers.models")
    words = models.Transformer(str(tmp_path / "bert"), max_seq_length=32)
    model = sentence_transformers.SentenceTransformer(modules=[words, models.Pooling(32)])
    model.save(str(tmp_path / "model"))
    return tmp_path / "model"


def test_a_model_of_sentence_transformers(saved_model):
    features, mask = encode(find_encoder(str(saved_model)), "saved", TEXTS)
    assert features.shape == (4, 32)
    assert features.dtype == np.float32
    assert mask.tolist() == [True, False, True, True]
    assert not features[1].any()
    np.testing.assert_allclose(features[0], features[3], rtol=1e-4)
    assert np.abs(features[0] - features[2]).max() > 1e-3


def test_a_model_that_cannot_be_had(monkeypatch, refuses):
    def model(name):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=model))
    refuses(DataError, lambda: find_encoder("some/model"), "'some/model'", "couldn't connect to the hub", "--text-vectors")
