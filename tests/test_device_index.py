"""DeviceIndex, as far as it goes without a device: storage, certificate, ids, refusals.

Its scans run on the emulated machine in tests/simt and on a GPU in tests/gpu.
"""

import pytest
import torch

from realm_fast import MipsIndex, Provenance
from realm_fast.device_index import DeviceIndex


@pytest.fixture
def emb():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 37, generator=generator)
    rows[::9] *= 100
    rows[4] = 0
    return rows


def decoded(index):
    """x~, in float64."""
    codes = index.codes.double()
    return codes if index.dtype != "int8" else codes * index.scale.double()[:, None]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_stored_norms_bound_the_error(emb, dtype):
    index = DeviceIndex.from_embeddings(emb, dtype)
    error = (emb.double() - decoded(index)).norm(dim=1)
    assert bool((index.residual.double() >= error).all())
    assert bool((index.residual.double() <= error * 1.001 + 1e-30).all())
    assert bool((index.norm.double() >= emb.double().norm(dim=1)).all())
    assert index.bounds.tolist() == [index.residual.max(), index.norm.max()]
    # No code is further from its value than rounding allows.
    assert float(error.max() / emb.norm(dim=1).max()) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_start_at_multiples_of_sixteen_bytes(emb, dtype):
    index = DeviceIndex.from_embeddings(emb, dtype)
    assert index.codes.stride(0) * index.codes.element_size() % 16 == 0
    assert index.codes.data_ptr() % 16 == 0
    assert index.codes.stride(1) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_reconstruct_gives_the_float32_rows(emb, dtype):
    ids = torch.arange(500) * 3 + 1
    index = DeviceIndex.from_embeddings(emb, dtype, ids)
    assert torch.equal(index.reconstruct(ids[[5, 0, 499]]), emb[[5, 0, 499]])
    with pytest.raises(ValueError, match="ids: 2 is not in the index"):
        index.reconstruct(torch.tensor([1, 2]))
    assert len(index) == 500
    assert index.nbytes >= emb.numel() * 4


def test_store_overwrites_rows_as_a_refresh_does(emb):
    index = DeviceIndex.from_embeddings(emb, "int8")
    other = DeviceIndex("int8", 37, 500, torch.device("cpu"))
    for begin in (300, 0, 150):
        other.store(begin, emb[begin : min(begin + 150, 500)])
    other.store(450, emb[450:])
    other.seal()
    for name in ("codes", "scale", "residual", "norm", "bounds", "originals"):
        assert torch.equal(getattr(index, name), getattr(other, name)), name


def test_a_float32_index_on_the_cpu_searches_there(emb):
    """The same rows, ids and exclusions as MipsIndex."""
    ids = torch.randperm(2000, generator=torch.Generator().manual_seed(2))[:500].sort().values
    provenance = Provenance("encoder", "corpus", 7)
    index = DeviceIndex.from_embeddings(emb, "float32", ids, provenance=provenance)
    assert index.provenance == provenance
    queries = torch.randn(6, 37)
    exclude = torch.stack([ids[:6], torch.full((6,), -1), torch.full((6,), 1999)], 1)
    got = index.search(queries, 9, exclude_ids=exclude)
    want = MipsIndex.from_embeddings(emb, "float32", ids).search(queries, 9, exclude_ids=exclude)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.scores, want.scores)


def test_from_index_orders_by_id(emb):
    source = MipsIndex.from_embeddings(emb[:100], "float32", torch.arange(200, 100, -1))
    source.delete(torch.tensor([150]))
    index = DeviceIndex.from_index(source, "cpu", "int8")
    assert index.ids.tolist() == sorted(set(range(101, 201)) - {150})
    assert torch.equal(index.reconstruct(torch.tensor([200, 101])), emb[[0, 99]])


def test_codes_are_not_searched_without_a_gpu(emb):
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        DeviceIndex.from_embeddings(emb, "int8").search(emb[:2], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.__setitem__((7, 2), torch.nan), "row 7 is not finite"),
        (lambda e: e.__setitem__((3, 0), torch.inf), "row 3 is not finite"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rows_that_are_not_finite_are_refused(emb, dtype, change, message):
    change(emb)
    with pytest.raises(ValueError, match=message):
        DeviceIndex.from_embeddings(emb, dtype)
    assert len(DeviceIndex.from_embeddings(emb, "float32")) == 500


def test_bad_arguments_are_named(emb):
    with pytest.raises(ValueError, match="dtype: expected one of"):
        DeviceIndex.from_embeddings(emb, "int4")
    with pytest.raises(ValueError, match="ids: expected distinct ids >= 0 in ascending order"):
        DeviceIndex.from_embeddings(emb, ids=torch.arange(500).flip(0))
    with pytest.raises(ValueError, match="at most 65536"):
        DeviceIndex("int8", 70_000, 1, torch.device("cpu"))
    index = DeviceIndex.from_embeddings(emb)
    with pytest.raises(ValueError, match=r"queries: expected \[B, 37\]"):
        index.search(torch.randn(2, 36), 3)
    with pytest.raises(ValueError, match="exact: "):
        index.search(emb[:2], 3, exact=False)
    with pytest.raises(ValueError, match="first_row: expected an int >= 0 and <= 498"):
        index.store(499, emb[:2])


def test_nothing_and_almost_nothing():
    for dtype in ("float32", "bfloat16", "int8"):
        assert len(DeviceIndex.from_embeddings(torch.empty(0, 8), dtype)) == 0
    found = DeviceIndex.from_embeddings(torch.empty(0, 8), "float32").search(torch.randn(2, 8), 3)
    assert found.ids.tolist() == [[-1] * 3] * 2
