"""One top-k method in a process of its own: built once over a file of vectors, then timed call by call.

    python -m realm_fast.benchmarks.topk_methods METHOD blocks.npy queries.npy THREADS

reads requests {"queries": B, "k": k} from standard input, one JSON object a line, and answers each with
{"seconds": s} or {"error": text}; {"check": path} in a request also saves ids and scores there. A process
per method keeps thread pools, OpenMP runtimes and OPENBLAS_CORETYPE (read when the library loads) apart.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # queries, k -> scores, ids


@dataclass(frozen=True)
class Method:
    """`exact`: must return the true float32 top k; otherwise the share of it that it found is reported."""

    name: str
    build: Callable[[np.ndarray, int], Search]
    kind: str = "float32"  # the arithmetic of its scan, for the roofline
    bytes_per_value: int = 4
    exact: bool = True
    ours: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def _ours(dtype: str) -> Callable[[np.ndarray, int], Search]:
    def build(blocks: np.ndarray, threads: int) -> Search:
        import torch

        import realm_fast as rf

        torch.set_num_threads(threads)
        index = rf.MipsIndex.from_embeddings(torch.from_numpy(blocks), dtype)
        if dtype != "float32":
            index.search(torch.from_numpy(blocks[:1]), 1)

        def search(queries: np.ndarray, k: int):
            scores, ids = index.search(torch.from_numpy(queries), k)
            return scores.numpy(), ids.numpy()

        return search

    return build


def _ours_rows(blocks: np.ndarray, threads: int) -> Search:
    import torch

    import realm_fast as rf

    torch.set_num_threads(threads)
    tensor = torch.from_numpy(np.array(blocks))

    def search(queries: np.ndarray, k: int):
        scores, ids = rf.mips_topk(torch.from_numpy(queries), tensor, k)
        return scores.numpy(), ids.numpy()

    return search


def _faiss(blas_threshold: int | None) -> Callable[[np.ndarray, int], Search]:
    def build(blocks: np.ndarray, threads: int) -> Search:
        import faiss

        faiss.omp_set_num_threads(threads)
        if blas_threshold is not None:
            faiss.cvar.distance_compute_blas_threshold = blas_threshold
        index = faiss.IndexFlatIP(blocks.shape[1])
        index.add(blocks)
        return lambda queries, k: index.search(queries, k)

    return build


def _faiss_bf16(blocks: np.ndarray, threads: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexScalarQuantizer(
        blocks.shape[1], faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT
    )
    index.train(blocks[:1])
    index.add(blocks)
    return lambda queries, k: index.search(queries, k)


def _torch(bfloat16: bool) -> Callable[[np.ndarray, int], Search]:
    def build(blocks: np.ndarray, threads: int) -> Search:
        import torch

        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        tensor = torch.from_numpy(np.array(blocks)).to(dtype)

        def search(queries: np.ndarray, k: int):
            scores = torch.from_numpy(queries).to(dtype) @ tensor.T
            values, ids = scores.topk(k, dim=1)
            return values.float().numpy(), ids.numpy()

        return search

    return build


def _numpy(blocks: np.ndarray, threads: int) -> Search:
    data = np.array(blocks)

    def search_some(queries: np.ndarray, k: int):
        scores = queries @ data.T
        part = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, part, 1), axis=1, kind="stable")
        ids = np.take_along_axis(part, order, 1)
        return np.take_along_axis(scores, ids, 1), ids

    def search(queries: np.ndarray, k: int):  # 64 at a time: argpartition's indices take 8 bytes a score
        parts = [search_some(queries[i : i + 64], k) for i in range(0, len(queries), 64)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    return search


def _usearch(dtype: str) -> Callable[[np.ndarray, int], Search]:
    def build(blocks: np.ndarray, threads: int) -> Search:
        from usearch.index import MetricKind
        from usearch.index import search as usearch_search

        data = np.array(blocks) if dtype == "f32" else blocks.astype(np.float16)

        def search(queries: np.ndarray, k: int):
            values = queries.astype(data.dtype)
            found = usearch_search(data, values, k, MetricKind.IP, exact=True, threads=threads)
            distances, keys = np.atleast_2d(found.distances), np.atleast_2d(found.keys)
            return 1 - distances, keys.astype(np.int64)

        return search

    return build


def _scann(quantize: bool) -> Callable[[np.ndarray, int], Search]:
    def build(blocks: np.ndarray, threads: int) -> Search:
        import scann

        builder = scann.scann_ops_pybind.builder(np.array(blocks), 10, "dot_product")
        index = builder.score_brute_force(quantize=quantize).build()
        index.set_num_threads(threads)

        def search(queries: np.ndarray, k: int):
            if len(queries) == 1:
                ids, scores = index.search(queries[0], final_num_neighbors=k)
                return scores[None], ids[None].astype(np.int64)
            ids, scores = index.search_batched_parallel(queries, final_num_neighbors=k)
            return scores, ids.astype(np.int64)

        return search

    return build


def _hnswlib(blocks: np.ndarray, threads: int) -> Search:
    import hnswlib

    index = hnswlib.BFIndex("ip", blocks.shape[1])
    index.init_index(len(blocks))
    index.set_num_threads(threads)
    index.add_items(np.array(blocks))

    def search(queries: np.ndarray, k: int):
        ids, distances = index.knn_query(queries, k)
        return 1 - distances, ids.astype(np.int64)

    return search


_SKYLAKE = {"OPENBLAS_CORETYPE": "SKYLAKEX"}
METHODS = {
    method.name: method
    for method in (
        Method("realm_fast float32", _ours("float32"), ours=True),
        Method("realm_fast bfloat16", _ours("bfloat16"), "bfloat16", 2, ours=True),
        Method("realm_fast int8", _ours("int8"), "int8", 1, ours=True),
        Method("realm_fast mips_topk", _ours_rows, ours=True),
        Method("faiss", _faiss(None)),
        Method("faiss threshold", _faiss(1)),
        Method("faiss skylakex", _faiss(None), environment=_SKYLAKE),
        Method("faiss skylakex threshold", _faiss(1), environment=_SKYLAKE),
        Method("faiss SQbf16", _faiss_bf16, "bfloat16", 2, exact=False),
        Method("torch float32", _torch(False)),
        Method("torch bfloat16", _torch(True), "bfloat16", 2, exact=False),
        Method("numpy", _numpy),
        Method("usearch float32", _usearch("f32")),
        Method("usearch float16", _usearch("f16"), bytes_per_value=2, exact=False),
        Method("scann float32", _scann(False)),
        Method("scann int8", _scann(True), "int8", 1, exact=False),
        Method("hnswlib", _hnswlib),
    )
}
TUNED_FAISS = ("faiss", "faiss threshold", "faiss skylakex", "faiss skylakex threshold")


def main(argv: list[str]) -> None:
    name, blocks_file, queries_file, threads = argv
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; answers have a channel of their own
    blocks, queries = np.load(blocks_file, mmap_mode="r"), np.load(queries_file)

    def answer(value: dict[str, object]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        begin = time.perf_counter()
        search = METHODS[name].build(blocks, int(threads))
        answer({"ready": time.perf_counter() - begin})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        request = json.loads(line)
        some = np.ascontiguousarray(queries[: request["queries"]])
        try:
            begin = time.perf_counter()
            scores, ids = search(some, request["k"])
            seconds = time.perf_counter() - begin
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
            continue
        if "check" in request:
            np.savez(request["check"], scores=np.asarray(scores, np.float32), ids=np.asarray(ids, np.int64))
        answer({"seconds": seconds})


if __name__ == "__main__":
    main(sys.argv[1:])
