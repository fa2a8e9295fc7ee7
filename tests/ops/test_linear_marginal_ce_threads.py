"""linear_marginal_cross_entropy: any number of threads, and any number of ranks, makes one answer."""

import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import realm_fast as rf

STORAGE_AND_AUTOCAST = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32 under autocast": (torch.float32, torch.bfloat16),
}


@pytest.fixture
def poisoned_memory():
    """New tensors hold NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(dtype, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 3, 26, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 26, generator=g) * 0.4).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (3, 3), generator=g)
    labels[1, 2] = -100
    scores = torch.randn(3, 5, generator=g).requires_grad_()
    return hidden, weight, bias, labels, scores


def loss_and_gradients(inputs, autocast, **options):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = rf.linear_marginal_cross_entropy(*inputs, impl="cpu", **options)
    hidden, weight, bias, _, scores = inputs
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias, scores))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", STORAGE_AND_AUTOCAST)
@pytest.mark.usefixtures("poisoned_memory", "restore_threads")
def test_no_thread_undoes_anothers_work(cpu_level, kind, level):
    """Several slices and chunks of an odd vocabulary, hundreds of runs: loss and every gradient bit by bit."""
    dtype, autocast = STORAGE_AND_AUTOCAST[kind]
    inputs = problem(dtype, vocab=1201)
    options = {"level": level, "chunk_bytes": 120_000}
    for keep in (0, 1 << 17):  # float32 and float64: in one pass, and in two
        options["keep_logits_bytes"] = keep
        torch.set_num_threads(1)
        alone = loss_and_gradients(inputs, autocast, **options)
        assert all(t.isfinite().all() for t in alone)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for repeat in range(5):
                together = loss_and_gradients(inputs, autocast, **options)
                for a, b in zip(together, alone, strict=True):
                    assert torch.equal(a, b), f"{keep} bytes kept, {threads} threads, run {repeat}"


class Tied(torch.nn.Module):
    """A trunk whose embedding is also the output weight, and a retriever's scores; the loss is its output."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(61, 24)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 61))
        self.score = torch.nn.Linear(24, 1, bias=False)

    def forward(self, tokens, labels, impl):  # tokens [B, K, M]
        hidden = torch.tanh(self.embedding(tokens))
        scores = self.score(hidden.mean(2))[..., 0]
        arguments = (hidden, self.embedding.weight, self.bias, labels, scores)
        losses = rf.linear_marginal_cross_entropy(*arguments, reduction="none", impl=impl)
        return losses.sum(1).mean() + rf.linear_marginal_cross_entropy(*arguments, impl=impl)


def tied_problem(batch=6):
    torch.manual_seed(0)
    return Tied(), torch.randint(61, (batch, 4, 5)), torch.randint(61, (batch, 5))


def one_rank(rank, ranks, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    model, tokens, labels = tied_problem()
    wrapped = DistributedDataParallel(model)
    share = slice(rank * len(tokens) // ranks, (rank + 1) * len(tokens) // ranks)
    wrapped(tokens[share], labels[share], "cpu").backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    save_file(gradients, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Two ranks of half the batch each: the gradients of plain torch over the whole batch, on both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (2, port, tmp_path), nprocs=2)
    model, tokens, labels = tied_problem()
    model(tokens, labels, "reference").backward()
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ranks[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert parameter.grad.abs().max() > 1e-3  # there was something to compare
