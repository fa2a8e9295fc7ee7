"""The trunk over packed tokens: transformers' values, whatever the lengths, precision and activation."""

import copy

import numpy as np
import pytest
import torch
from model_world import TRUNK, make_embedder, make_store, one_thread, real_documents  # noqa: F401
from tolerances import FLOOR, assert_as_good_as_torch, largest_error

import realm_fast.block_encoder as block_encoder_module
import realm_fast.packed_trunk as packed_trunk_module
from realm_fast.block_encoder import PackedEncoder, PaddedEncoder, block_encoder, resolve_precision
from realm_fast.embedding import EmbeddingStats, embed_blocks
from realm_fast.encoder import load_trunk
from realm_fast.errors import ConfigError
from realm_fast.packed_trunk import PackedTrunk, equal_runs
from realm_fast.packing import Row, pack_rows, pad_pack

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = [[9, 9, 9, 5, 5, 2], [1], [3, 11, 3, 3, 128, 1], [7] * 20]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("packed"), real_documents(20))


@pytest.fixture(params=["onednn", "torch"])
def product(request, monkeypatch):
    """Both ways a product may go, whatever this CPU has."""
    if request.param == "torch":
        monkeypatch.setattr(packed_trunk_module, "_onednn_takes", lambda dtype: False)
    elif not packed_trunk_module._onednn_takes(torch.float32):
        pytest.skip("this build of torch has no oneDNN")


def make_pack(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return pack_rows(
        [
            Row(
                rng.integers(5, 400, n).astype(np.int32),
                (np.arange(n) >= rng.integers(n + 1)).astype(np.uint8),
            )
            for n in lengths
        ]
    )


def make_trunk(spec=TRUNK, seed=0):
    """Random in every weight: LayerNorm's ones and zeros, and zero biases, would hide a mistake."""
    torch.manual_seed(seed)
    trunk = load_trunk(spec, mlm_head=False, vocab_size=400).eval()
    for name, parameter in trunk.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("Norm.weight" in name), std=0.2)
    return trunk.requires_grad_(False)


def by_transformers(trunk, pack, dtype=torch.float64):
    """transformers' own forward, row by row; [S, H] float64."""
    model = copy.deepcopy(trunk.model).to(dtype)
    first = trunk.first_position
    rows = []
    for ids, segments in zip(*(x.split(pack.cu_seqlens.diff().tolist()) for x in (pack.ids, pack.segments))):
        rows.append(
            model(
                input_ids=ids[None], token_type_ids=trunk.segments(segments)[None],
                position_ids=torch.arange(first, first + len(ids))[None],
            ).last_hidden_state[0]
        )  # fmt: skip
    return torch.cat(rows).double()


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_values_are_those_of_transformers(product, precision, lengths, first_only):
    trunk, pack = make_trunk(), make_pack(lengths)
    truth, same_type = (by_transformers(trunk, pack, dtype) for dtype in (torch.float64, TYPES[precision]))
    got = PackedTrunk(trunk, TYPES[precision], first_only=first_only)(pack)
    assert got.dtype == torch.float32
    if first_only:
        truth, same_type = (x[pack.cu_seqlens[:-1]] for x in (truth, same_type))
    allowed = 2 * largest_error(same_type, truth) + FLOOR[TYPES[precision]] * float(truth.abs().max())
    assert largest_error(got, truth) <= allowed


@pytest.mark.parametrize("spec", [f"{TRUNK},type=roberta", f"{TRUNK},heads=1", f"{TRUNK},layers=1"])
@pytest.mark.parametrize("first_only", [False, True])
def test_other_trunks_of_the_layout(product, spec, first_only):
    trunk, pack = make_trunk(spec), make_pack([6, 6, 4])
    truth, same_type = (by_transformers(trunk, pack, dtype) for dtype in (torch.float64, torch.float32))
    got = PackedTrunk(trunk, torch.float32, first_only=first_only)(pack)
    if first_only:
        truth, same_type = (x[pack.cu_seqlens[:-1]] for x in (truth, same_type))
    assert_as_good_as_torch(got, truth, same_type)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_the_activation_is_the_configured_one(product, activation):
    from transformers.activations import get_activation

    trunk, pack = make_trunk(), make_pack([6, 6, 4])
    for layer in trunk.model.encoder.layer:
        layer.intermediate.intermediate_act_fn = get_activation(activation)
    truth, same_type = (by_transformers(trunk, pack, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(PackedTrunk(trunk, torch.float32, first_only=False)(pack), truth, same_type)


def test_later_changes_of_the_weights_do_not_reach_it_half(store):
    """The trainer goes on while a copy embeds; a second encoder sees the new weights whole."""
    trunk, pack = make_trunk(), make_pack([6, 6, 4])
    before = PackedTrunk(trunk, torch.float32, first_only=False)(pack)
    with torch.no_grad():
        for parameter in trunk.model.encoder.parameters():
            parameter.mul_(1.5)
    after = PackedTrunk(trunk, torch.float32, first_only=False)(pack)
    assert (after - before).abs().max() > 0.01
    assert_as_good_as_torch(after, by_transformers(trunk, pack), by_transformers(trunk, pack, torch.float32))


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [([], []), ([4], [(0, 1, 4)]), ([4, 4, 2, 4], [(0, 2, 4), (8, 1, 2), (10, 1, 4)])],
)
def test_equal_runs(lengths, runs):
    assert equal_runs(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)) == runs


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_encoders_give_an_embedder_the_same_rows(store, pooling, precision):
    embedder = make_embedder(store, pooling=pooling).eval()
    pack = pack_rows([Row(np.arange(5, 5 + n, dtype=np.int32), np.zeros(n, np.uint8)) for n in (8, 8, 3)])
    with torch.inference_mode():
        rows = []
        for kind in (PackedEncoder, PaddedEncoder):
            encoder = kind(embedder, precision)
            states = encoder.encode(encoder.prepare(pack))
            rows.append(embedder.block_side.epilogue(**states).out)
        batch = pad_pack(pack, embedder.special.pad_id)
        truth = copy.deepcopy(embedder).double().block_emb(batch)
    assert_as_good_as_torch(rows[0], truth, rows[1].to(TYPES[precision]))


def test_embedding_with_it_pads_nothing(store):
    stats = EmbeddingStats()
    embed_blocks(make_embedder(store), store, token_budget=512, stats=stats)
    assert stats.padding_waste == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_pack_gives_the_same_bits_on_any_encoder(store, precision):
    embedder = make_embedder(store)
    one, two = (embed_blocks(copy.deepcopy(embedder), store, precision=precision) for _ in range(2))
    assert torch.equal(one, two)


def test_a_trunk_of_another_layout_keeps_its_own_forward(store):
    embedder = make_embedder(store, trunk=f"{TRUNK},type=distilbert")
    assert isinstance(block_encoder(embedder, "float32"), PaddedEncoder)
    stats = EmbeddingStats()
    got = embed_blocks(embedder, store, stats=stats)
    assert stats.padding_waste > 0
    with torch.inference_mode():
        encoder = PaddedEncoder(embedder.eval(), "float32")
        pack = packed_blocks(store, [3], embedder)
        expected = embedder.block_side.epilogue(**encoder.encode(encoder.prepare(pack))).out
    torch.testing.assert_close(got[3:4], expected, rtol=1e-5, atol=1e-5)


def packed_blocks(store, ids, embedder):
    from realm_fast.packing import pack_blocks

    return pack_blocks(store, np.array(ids), embedder.special)


def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch):
    for has_it, capability, expected in ((True, (8, 0), "bfloat16"), (False, (7, 5), "float32")):
        detected = {"detected": {"avx512bf16": has_it}}
        monkeypatch.setattr(block_encoder_module, "cpu_features", lambda detected=detected: detected)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_precision("auto", torch.device("cpu")) == expected
        assert resolve_precision("auto", torch.device("cuda")) == expected
    assert resolve_precision("float32", torch.device("cuda")) == "float32"
    with pytest.raises(ConfigError, match="precision: expected auto, float32 or bfloat16, got 'half'"):
        resolve_precision("half", torch.device("cpu"))
