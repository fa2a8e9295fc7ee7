"""The Triton kernel compiled ahead of time for GPUs that are not here, and what the compiler made of it.

Proved: it compiles for sm_80, sm_90, sm_100, sm_120 and gfx942; nothing spills and nothing lives in local memory;
where the projection is fused the matrix units do it; token states come in 128-bit loads; the cast to bfloat16
rounds to nearest. Not proved here: that the hardware computes the right values (tests marked gpu do that).
"""

import dataclasses
import functools
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from realm_fast.kernels import embed_epilogue as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
              torch.uint8: "u8"}  # fmt: skip
MISSING_TOOLS = ("ld.lld not found", "Cannot find ptxas")  # what Triton says
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Case:
    hidden_dim: int
    dim: int
    mean: bool
    project: bool = True
    hidden: torch.dtype = torch.bfloat16
    weight: torch.dtype = torch.bfloat16
    out: torch.dtype = torch.float32
    ragged: bool = True
    panel: int = 1
    group: int = 1


# One case for each choice of the table, compiled for every target.
CASES = {
    "realm: cls, 768 to 128, int8 panels": Case(768, 128, mean=False, out=torch.uint8, panel=48, group=4),
    "mean, 768 to 256, bfloat16 panels": Case(768, 256, mean=True, out=torch.bfloat16, panel=48, group=2),
    "contriever: mean, 768, bfloat16 rows": Case(768, 768, mean=True, project=False, out=torch.bfloat16),
    "dpr: cls, 768": Case(768, 768, mean=False, project=False, hidden=torch.float32),
}
# Variations, compiled for one NVIDIA and the AMD target.
MORE_CASES = {
    "cls, 768 to 256, bfloat16 rows": Case(768, 256, mean=False, out=torch.bfloat16),
    "cls, all float32, padded": Case(768, 128, False, True, torch.float32, torch.float32, ragged=False),
    "cls, 384 to 128, float32 weights": Case(384, 128, mean=False, weight=torch.float32),
    "mean, 768 to 128, int8": Case(768, 128, mean=True, out=torch.int8),
    "mean, all float32": Case(384, 128, True, True, torch.float32, torch.float32),
    "mean, all float16": Case(768, 128, True, True, torch.float16, torch.float16),
    "minilm: mean, 384, int8, padded": Case(384, 384, True, False, out=torch.int8, ragged=False),
    "mean, 4096, the widest": Case(4096, 4096, mean=True, project=False),
}


def compile_case(case: Case, target: GPUTarget, **more_options):
    """The compiled kernel as Triton's launcher would specialise it for contiguous 16-byte aligned tensors."""
    name = kernels.target_of(target.backend, target.arch // 10 if target.backend == "cuda" else 0)
    config = kernels.config_for(name, case.mean, case.project, case.dim)
    function = kernels.compiled_kernel()
    out = TYPE_NAMES[case.out]
    weight, hidden = f"*{TYPE_NAMES[case.weight]}", f"*{TYPE_NAMES[case.hidden]}"
    pointers = {"hidden": hidden, "offsets": "*i32", "row_ids": "*i64", "weight": weight, "bias": weight,
                "ln_weight": weight, "ln_bias": weight, "out": f"*{out}", "scale": "*fp32",
                "residual_norm": "*fp32", "stored_norm": "*fp32"}  # fmt: skip
    strides = {"block_stride": "i64", "token_stride": "i64", "out_stride": "i64"}
    sizes = {"num_rows": "i32", "num_tokens": "i32", "num_out_rows": "i64", "ln_eps": "fp32"}
    constants = kernels.constants(
        config, hidden_dim=case.hidden_dim, dim=case.dim, project=case.project, mean=case.mean,
        hidden_dtype=case.hidden, weight_dtype=case.weight if case.project else None, backend=target.backend,
        group=case.group,
    ) | {
        "RAGGED": case.ragged, "MEAN": case.mean, "PROJECT": case.project, "HAS_BIAS": case.project,
        "LAYER_NORM": True, "HAS_LN_WEIGHT": True, "HAS_LN_BIAS": True, "NORMALIZE": True,
        "QUANTIZE": case.out in (torch.int8, torch.uint8), "SHIFT": 128 if case.out == torch.uint8 else 0,
        "RESIDUAL": case.out != torch.float32, "NORM": case.out != torch.float32, "PANEL": case.panel,
        "GROUP": case.group,
    }  # fmt: skip
    types = pointers | strides | sizes
    names = function.arg_names
    assert set(names) == set(types) | set(constants)
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in pointers | strides},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **more_options}
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        if any(tool in str(error) for tool in MISSING_TOOLS):
            pytest.skip(f"this Triton cannot finish a kernel for {target.arch}: {error}")
        raise


@functools.cache
def tool(name: str) -> str:
    path = NVIDIA_TOOLS / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}: the machine code cannot be read")
    return str(path)


@dataclasses.dataclass
class Resources:
    registers: int
    spills: int  # bytes of stack, or spilled registers
    shared_bytes: int
    matrix: set[str]
    loads: dict[str, int]


def nvidia_resources(compiled, folder: Path) -> Resources:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def read(*command):
        return subprocess.run([*command, str(cubin)], check=True, capture_output=True, text=True).stdout

    usage = read(tool("cuobjdump"), "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    sass = read(tool("nvdisasm"), "-c")
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loads = re.findall(r"\b(LDG(?:STS)?\.\S+)", sass)
    matrix = set(re.findall(r"\b((?:HMMA|HGMMA|UTCHMMA|UTCQMMA|DMMA)\S*)", sass))
    return Resources(
        numbers["REG"], numbers["STACK"] + numbers["LOCAL"] + local, compiled.metadata.shared, matrix,
        {name: loads.count(name) for name in set(loads)},
    )  # fmt: skip


def amd_resources(compiled) -> Resources:
    text = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    loads = re.findall(r"\b((?:global|buffer)_load_\w+)", text)
    return Resources(
        numbers["vgpr_count"],
        numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"] + numbers["private_segment_fixed_size"],
        compiled.metadata.shared,
        set(re.findall(r"\b(v_mfma_\w+)", text)),
        {name: loads.count(name) for name in set(loads)},
    )


def resources(compiled, target: GPUTarget, folder: Path) -> Resources:
    return amd_resources(compiled) if target.backend == "hip" else nvidia_resources(compiled, folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # whatever was compiled before


def expected_matrix_instruction(case: Case, target: GPUTarget) -> str:
    both = case.hidden == case.weight
    if target.backend == "hip":
        kinds = {torch.bfloat16: r"v_mfma_f32_16x16x\d+_bf16", torch.float16: r"v_mfma_f32_16x16x\d+_?f16"}
        return kinds.get(case.hidden if both else None, r"v_mfma_f32_16x16x4_?f32")
    kinds = {torch.bfloat16: r"HMMA\.16816\.F32\.BF16", torch.float16: r"HMMA\.16816\.F32"}
    return kinds.get(case.hidden if both else None, r"HMMA\.1688\.F32\.TF32")


@pytest.mark.parametrize(
    ("name", "target"),
    [*itertools.product(CASES, TARGETS), *itertools.product(MORE_CASES, ["sm_90", "gfx942"])],
)
def test_compiles_to_what_was_planned(name, target, tmp_path):
    case, gpu = (CASES | MORE_CASES)[name], TARGETS[target]
    compiled = compile_case(case, gpu)
    found = resources(compiled, gpu, tmp_path)

    assert found.spills == 0, found
    shared_limit = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}[target] * 1024
    assert found.shared_bytes <= shared_limit
    if case.project:
        expected = expected_matrix_instruction(case, gpu)
        assert any(re.fullmatch(expected, op) for op in found.matrix), (expected, found.matrix)
    else:
        assert not found.matrix
    wide = sum(count for op, count in found.loads.items() if re.search(r"128|dwordx4|b128", op))
    assert wide > 0, found.loads
    if case.out == torch.bfloat16 and gpu.backend == "cuda":
        assert re.search(r"cvt\.rn\.bf16x?2?\.f32", compiled.asm["ptx"])
    assert "div.full" not in compiled.asm.get("ptx", "")  # the approximate division


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.project])
def test_sm_120_takes_the_choice_of_sm_100_and_its_smaller_shared_memory_holds_it(name, tmp_path):
    gpu = GPUTarget("cuda", 120, 32)
    assert kernels.target_of(gpu.backend, 12) == "sm_100"
    found = resources(compile_case(CASES[name], gpu), gpu, tmp_path)
    assert found.spills == 0, found
    assert found.shared_bytes <= 99 * 1024
    assert any(op.startswith("HMMA.16816.F32.BF16") for op in found.matrix)


def test_the_check_for_spills_can_fail(tmp_path):
    """A kernel held to 32 registers must be reported as spilling."""
    compiled = compile_case(CASES["contriever: mean, 768, bfloat16 rows"], TARGETS["sm_80"], maxnreg=32)
    assert nvidia_resources(compiled, tmp_path).spills > 0


def test_every_configuration_of_the_table_is_used_by_a_case():
    used = {(target, case.mean, case.project) for target in TARGETS for case in CASES.values()}
    assert used == set(kernels.CONFIGS)
