"""The reader's states and gradients at masked positions; every span of the span reader by hand."""

import numpy as np
import pytest
import torch
from model_world import TRUNK, make_reader, make_store, one_thread, real_documents  # noqa: F401
from safetensors.torch import load_file, save_file

from realm_fast.config import ReaderConfig
from realm_fast.encoder import load_trunk
from realm_fast.errors import ConfigError, DataError, UserError
from realm_fast.packing import NO_TOKENS, body_mask, body_starts
from realm_fast.reader import Reader, SpanReader

FAMILIES = ("bert", "roberta", "distilbert")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("reader"), real_documents(8))


def joint_batch(reader, store, count=4):
    rows = [reader.joint_row(store.body_tokens(i)[:9], store.body_tokens(i + 1)) for i in range(count - 1)]
    return reader.pad([*rows, reader.joint_row(store.body_tokens(0)[:9], NO_TOKENS)])


def hf_masked_lm(store, kind, folder=None):
    """A masked LM of transformers with nothing left at 0."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(5)
    sizes = (
        {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32}
        if kind == "distilbert"
        else {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    )
    config = AutoConfig.for_model(
        kind,
        vocab_size=store.vocab_size,
        max_position_embeddings=128,
        pad_token_id=0,
        type_vocab_size=2,
        **sizes,
    )
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if folder is not None:
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_equal_those_of_transformers_masked_lm(store, tmp_path, kind):
    """Trunk, transform, tied weight and bias: all of a pretrained head, for every family."""
    model = hf_masked_lm(store, kind, tmp_path / "model")
    reader = Reader.from_config(
        ReaderConfig(trunk=str(tmp_path / "model"), max_joint_tokens=96), store.tokenizer()
    ).eval()
    batch = joint_batch(reader, store)
    positions = torch.tensor([[1, 4], [2, 2], [7, 0], [3, 5]])
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask.long()}
    if kind != "distilbert":
        inputs["token_type_ids"] = batch.segments
    expected = model(**inputs).logits.gather(1, positions[..., None].expand(-1, -1, store.vocab_size))
    logits = reader.masked_hidden(batch, positions) @ reader.vocab_weight.T + reader.vocab_bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert reader.notes == []
    assert reader.vocab_weight is reader.trunk.token_embedding


def test_gradients_reach_every_weight_as_through_transformers_own_model(store, tmp_path):
    model = hf_masked_lm(store, "bert", tmp_path / "model").double()
    config = ReaderConfig(trunk=str(tmp_path / "model"), max_joint_tokens=96)
    reader = Reader.from_config(config, store.tokenizer()).double().eval()
    batch = joint_batch(reader, store)
    positions = torch.tensor([[1, 4], [2, 2], [7, 0], [3, 5]])
    labels = torch.tensor([[9, 30], [4, 4], [8, 100], [77, 5]])
    loss = torch.nn.functional.cross_entropy
    ours = reader.masked_hidden(batch, positions) @ reader.vocab_weight.T + reader.vocab_bias
    loss(ours.flatten(0, 1), labels.flatten()).backward()
    theirs = model(
        input_ids=batch.ids, attention_mask=batch.attention_mask.long(), token_type_ids=batch.segments
    ).logits.gather(1, positions[..., None].expand(-1, -1, store.vocab_size))
    loss(theirs.flatten(0, 1), labels.flatten()).backward()
    pairs = [(reader.vocab_weight, model.bert.embeddings.word_embeddings.weight)]
    pairs += [(reader.vocab_bias, model.cls.predictions.bias)]
    pairs += [(reader.trunk.mlm_head.dense.weight, model.cls.predictions.transform.dense.weight)]
    pairs += list(zip(reader.trunk.model.parameters(), model.bert.parameters(), strict=True))
    assert len(pairs) > 35
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_a_trunk_without_a_head_gets_a_fresh_one_on_tied_embeddings(store, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=store.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bare")
    settings = ReaderConfig(trunk=str(tmp_path / "bare"), max_joint_tokens=96)
    torch.manual_seed(0)
    reader = Reader.from_config(settings, store.tokenizer())
    assert reader.notes == [
        f"{tmp_path / 'bare'} holds no masked-LM head: the reader starts with a fresh one on tied embeddings"
    ]
    assert reader.vocab_weight is reader.trunk.token_embedding
    assert torch.count_nonzero(reader.vocab_bias) == 0
    assert 0.01 < reader.trunk.mlm_head.dense.weight.std() < 0.03
    torch.manual_seed(0)
    again = Reader.from_config(settings, store.tokenizer())
    assert torch.equal(again.trunk.mlm_head.dense.weight, reader.trunk.mlm_head.dense.weight)


def test_an_untied_head_keeps_its_own_vocabulary(store, tmp_path):
    model = hf_masked_lm(store, "bert")
    model.config.tie_word_embeddings = False
    untied = torch.randn(store.vocab_size, 16)
    model.cls.predictions.decoder.weight = torch.nn.Parameter(untied.clone())
    model.save_pretrained(tmp_path / "untied")
    settings = ReaderConfig(trunk=str(tmp_path / "untied"), max_joint_tokens=96)
    reader = Reader.from_config(settings, store.tokenizer()).eval()
    torch.testing.assert_close(reader.vocab_weight.detach(), untied)
    assert reader.vocab_weight is not reader.trunk.token_embedding
    reader.save(tmp_path / "reader")
    assert torch.equal(Reader.load(tmp_path / "reader").vocab_weight, reader.vocab_weight)


def test_a_model_type_without_a_known_head_is_refused(store, tmp_path):
    from transformers import ElectraConfig, ElectraModel

    config = ElectraConfig(
        vocab_size=store.vocab_size, hidden_size=16, embedding_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(tmp_path / "electra")
    with pytest.raises(UserError, match="electra is not known here; a reader needs one of bert"):
        load_trunk(str(tmp_path / "electra"), mlm_head=True)
    assert load_trunk(str(tmp_path / "electra"), mlm_head=False).hidden_size == 16


def test_what_is_beyond_the_mask_changes_nothing(store):
    """The head sees masked positions only; other rows and padding do not matter."""
    reader = make_reader(store).eval()
    batch = joint_batch(reader, store)
    positions = torch.tensor([[1], [2], [3], [4]])
    together = reader.masked_hidden(batch, positions)
    for row in range(4):
        length = int(batch.attention_mask[row].sum())
        alone = type(batch)(*(part[row : row + 1, :length] for part in batch))
        torch.testing.assert_close(
            reader.masked_hidden(alone, positions[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", FAMILIES)
def test_save_and_load(store, tmp_path, kind):
    reader = make_reader(store, trunk=TRUNK + f",type={kind}").eval()
    reader.save(tmp_path / "reader")
    loaded = Reader.load(tmp_path / "reader").eval()
    batch = joint_batch(reader, store)
    positions = torch.tensor([[1], [2], [3], [4]])
    assert torch.equal(loaded.masked_hidden(batch, positions), reader.masked_hidden(batch, positions))
    assert torch.equal(loaded.vocab_weight, reader.vocab_weight)
    assert loaded.max_joint_tokens == 96
    names = load_file(tmp_path / "reader" / "model.safetensors")
    assert sum(w.shape == (store.vocab_size, 16) for w in names.values()) == 1  # tied: stored once


def test_a_joint_length_beyond_the_positions_is_refused(store):
    with pytest.raises(ConfigError, match=r"reader\.max_joint_tokens: .* takes at most 128 tokens, got 384"):
        Reader.from_config(ReaderConfig(trunk=TRUNK), store.tokenizer())


def test_joint_rows_cut_the_body_and_refuse_a_query_that_does_not_fit(store):
    reader = make_reader(store)
    row = reader.joint_row(np.arange(20), np.arange(500))
    assert row.ids.shape == (96,)
    assert row.ids[-1] == reader.special.sep_id
    with pytest.raises(DataError, match="120 tokens"):
        reader.joint_row(np.arange(120), NO_TOKENS)


# --- spans -----------------------------------------------------------------------------------------------


def make_span_reader(store, max_span_tokens=3):
    reader = make_reader(store)
    torch.manual_seed(2)
    span_reader = SpanReader.from_reader(
        reader, span_hidden=6, max_span_tokens=max_span_tokens, max_reader_tokens=96
    )
    with torch.no_grad():
        for name, parameter in span_reader.named_parameters():
            if not name.startswith("trunk."):
                parameter.normal_()
    return span_reader.double().eval()


def test_every_span_by_the_formula_and_none_outside_the_body(store):
    reader = make_span_reader(store)
    batch = joint_batch(reader, store)
    logits = reader.span_logits(batch)
    states = reader.trunk(batch)
    inside = body_mask(batch)
    rows, length = batch.ids.shape
    assert logits.shape == (rows, length, 3)
    assert logits.dtype == torch.float64
    finite = 0
    for r in range(rows):
        for t in range(length):
            for w in range(3):
                if t + w >= length or not inside[r, t : t + w + 1].all():
                    assert logits[r, t, w] == -torch.inf
                    continue
                x = torch.relu(
                    reader.start_projection.weight @ states[r, t]
                    + reader.start_projection.bias
                    + reader.end_projection.weight @ states[r, t + w]
                )
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-3).sqrt()
                x = x * reader.norm.weight + reader.norm.bias
                expected = reader.score.weight[0] @ x + reader.score.bias[0]
                torch.testing.assert_close(logits[r, t, w], expected, rtol=1e-9, atol=1e-9)
                finite += 1
    body = inside.sum(dim=1)
    assert finite == int((3 * body - 3).clamp(min=0).sum())  # n + (n - 1) + (n - 2) spans each
    assert body[-1] == 0  # the null block has no span


def test_span_gradients_equal_those_without_recomputation(store):
    reader = make_span_reader(store)
    batch = joint_batch(reader, store)
    parameters = [p for name, p in reader.named_parameters() if "mlm_head" not in name]

    def gradients(logits):
        reader.zero_grad()
        logits[torch.isfinite(logits)].square().sum().backward()
        return [p.grad.clone() for p in parameters if p.grad is not None]

    def all_widths_at_once():
        states = reader.trunk(batch)
        length = states.shape[1]
        starts, ends = reader.start_projection(states), reader.end_projection(states)
        index = torch.arange(length)[:, None] + torch.arange(3)
        pairs = starts[:, :, None] + ends[:, index.clamp(max=length - 1)]
        scores = reader.score(reader.norm(torch.relu(pairs)))[..., 0]
        return scores.masked_fill(~torch.isfinite(reader.span_logits(batch)), -torch.inf)

    ours, expected = gradients(reader.span_logits(batch)), gradients(all_widths_at_once())
    assert len(ours) == len(expected) > 35
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12 * largest)


def test_span_memory_does_not_grow_with_the_width(store):
    """What the graph keeps for the backward pass: the same for 2 widths and for 16."""

    def saved_bytes(max_span_tokens):
        reader = make_span_reader(store, max_span_tokens)
        batch = joint_batch(reader, store)
        storages = {}  # the widths' slices are views: they share the storage of the two projections

        def pack(tensor):
            if tensor.shape[-1:] == (6,):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            reader.span_logits(batch)
        return sum(storages.values())

    assert saved_bytes(16) <= saved_bytes(2)


def test_widths_beyond_the_row_are_impossible(store):
    reader = make_span_reader(store, max_span_tokens=90)
    batch = reader.pad([reader.joint_row(np.array([5, 6]), np.array([7, 8, 9]))])
    logits = reader.span_logits(batch)
    assert logits.shape == (1, 8, 90)
    assert torch.isfinite(logits).sum() == 6


def test_gold_spans_are_marked_where_they_stand(store):
    reader = make_span_reader(store)
    batch = reader.pad([
        reader.joint_row(np.array([5, 6]), np.array([7, 8, 9, 10])),
        reader.joint_row(np.array([5]), np.array([7, 8])),
        reader.joint_row(np.array([5]), NO_TOKENS),
    ])  # fmt: skip
    gold = reader.gold_mask(batch, [[(0, 1), (1, 4), (0, 4)], [(1, 2), (1, 3), (5, 6)], [(0, 1)]])
    assert body_starts(batch).tolist() == [4, 3, 3]
    # (0, 4) is wider than 3; (1, 3) and (5, 6) reach beyond the body; the null block has none.
    assert gold.nonzero().tolist() == [[0, 4, 0], [0, 5, 2], [1, 4, 0]]
    assert torch.isfinite(reader.span_logits(batch)[gold]).all()
    assert not reader.gold_mask(batch, [[], [], []]).any()


def test_best_spans_in_body_coordinates_ties_to_the_first(store):
    reader = make_span_reader(store)
    batch = reader.pad([
        reader.joint_row(np.array([5, 6]), np.array([7, 8, 9, 10])),
        reader.joint_row(np.array([5]), np.array([7, 8])),
    ])  # fmt: skip
    logits = torch.full((2, batch.ids.shape[1], 3), -torch.inf)
    logits[0, 5, 1], logits[1, 3, 0], logits[0, 4, 2] = 2.0, 2.0, 1.0
    best = reader.best_spans(batch, logits, k=5)
    assert [(s.row, s.start, s.stop, s.score) for s in best] == [
        (0, 1, 3, 2.0),
        (1, 0, 1, 2.0),
        (0, 0, 3, 1.0),
    ]
    assert reader.best_spans(batch, logits)[0] == best[0]


def test_span_reader_save_and_load(store, tmp_path):
    reader = make_span_reader(store).float()
    reader.save(tmp_path / "span_reader")
    loaded = SpanReader.load(tmp_path / "span_reader").eval()
    batch = joint_batch(reader, store)
    assert torch.equal(loaded.span_logits(batch), reader.span_logits(batch))
    assert (loaded.max_span_tokens, loaded.max_reader_tokens) == (3, 96)
    with pytest.raises(DataError, match="expected a saved reader, found span_reader"):
        Reader.load(tmp_path / "span_reader")
    weights = load_file(tmp_path / "span_reader" / "model.safetensors")
    assert not [name for name in weights if "mlm_head" in name]
    save_file(weights, tmp_path / "span_reader" / "model.safetensors")
