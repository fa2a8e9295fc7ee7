"""The machine code in the built module: resources, spills, and what the main loops consist of. Needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from realm_fast.benchmarks.gpu import model

from realm_fast import _native, build_info

ARCHS = ("80", "90", "100", "120")
# The scan is planned for two thread blocks of 256 a multiprocessor, which shares 65536 registers.
REGISTERS, SCAN_THREADS, SCAN_BLOCKS = 65536, 256, 2
# Element type of an instantiation of the scan -> the instruction its main loop must consist of.
MATRIX_INSTRUCTION = {
    "13__nv_bfloat16": r"HMMA\.16816\.F32\.BF16",
    "6__half": r"HMMA\.16816\.F32(?!\.BF16)",
    "a": r"IMMA\.16832\.S8\.S8",
    "f": r"FFMA",
}
SCAN = re.compile(r"4scanI(13__nv_bfloat16|6__half|a|f)Li(\d+)E")
# Hopper's scan: element type and slabs of 128 bytes a row.
WGMMA_SCAN = re.compile(r"10scan_wgmmaI(13__nv_bfloat16|6__half)Li(\d)E")
# The chunk kernels on aligned rows: kernel, and the element type that dlogits writes.
CHUNK = re.compile(r"(lse_update|dlogits)I[fd](13__nv_bfloat16|6__half|[fd])?Lb1E")
HALVES = ("13__nv_bfloat16", "6__half")
WGMMA_ARCH, WGMMA_SLABS, WGMMA_ROUND_STEPS = "90a", (1, 2), 4


def package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations] if spec else []


def find_tool(name: str) -> str | None:
    """On PATH, beside nvcc, in CUDA_HOME, or in NVIDIA's Python packages (or triton's)."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent / name] if nvcc else []
    places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name)
    places += [place for folder in package_folders("nvidia") for place in folder.glob(f"*/bin/{name}")]
    places += [folder / "backends/nvidia/bin" / name for folder in package_folders("triton")]
    return shutil.which(name) or next((str(place) for place in places if os.access(place, os.X_OK)), None)


@pytest.fixture(scope="module")
def cuobjdump():
    if not build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels (no nvcc was found when it was built)")
    tools = {name: find_tool(name) for name in ("cuobjdump", "nvdisasm")}
    for name, place in tools.items():
        if place is None:
            pytest.skip(f"{name} was not found (CUDA toolkit, or pip install nvidia-cuda-{name})")
    folders = [str(Path(place).parent) for place in tools.values()]
    environment = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]])}

    def run(*arguments: str) -> str:
        command = [tools["cuobjdump"], *arguments, _native.__file__]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def resources(cuobjdump):
    """(target, kernel) -> {"REG", "STACK", "SHARED", "LOCAL"}."""
    found = {}
    arch = name = None
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and name is not None:
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_every_kernel_is_built_for_every_target(resources):
    names = {name for arch, name in resources if arch != WGMMA_ARCH}
    assert len([name for name in names if SCAN.search(name)]) == 2 * len(MATRIX_INSTRUCTION)
    assert {(arch, name) for arch in ARCHS for name in names} <= set(resources)


def test_hoppers_scan_is_built_for_sm_90a_alone(resources):
    found = sorted(WGMMA_SCAN.search(name).groups() for arch, name in resources if arch == WGMMA_ARCH)
    elements = ("13__nv_bfloat16", "6__half")
    assert found == sorted((element, str(slabs)) for element in elements for slabs in WGMMA_SLABS)
    assert not any(WGMMA_SCAN.search(name) for arch, name in resources if arch != WGMMA_ARCH)


def test_no_kernel_spills_or_uses_local_memory(resources):
    for (arch, name), used in resources.items():
        assert used["STACK"] == used["LOCAL"] == 0, f"sm_{arch}, {name}: {used}"


def test_registers_allow_the_planned_occupancy(resources):
    for (arch, name), used in resources.items():
        assert used["REG"] <= 255
        if SCAN.search(name):
            assert used["REG"] * SCAN_THREADS * SCAN_BLOCKS <= REGISTERS, f"sm_{arch}, {name}: {used}"


@pytest.mark.parametrize(
    ("device", "arch"),
    [(model.A100, "80"), (model.H100, "90"), (model.H200, "90")],
    ids=["A100", "H100", "H200"],
)
@pytest.mark.parametrize(
    ("dtype", "num_queries", "dim", "blocks"),
    [("bfloat16", 64, 128, 2), ("bfloat16", 128, 128, None), ("bfloat16", 512, 128, 1),
     ("int8", 64, 128, 2), ("int8", 512, 128, 1), ("float32", 64, 128, None), ("bfloat16", 64, 768, 1)],
)  # fmt: skip
def test_shared_memory_and_registers_hold_the_thread_blocks_that_were_planned(
    resources, device, arch, dtype, num_queries, dim, blocks
):
    plan = model.make_plan(dtype, num_queries, dim, device)
    assert blocks in (plan.blocks_per_multiprocessor, None)
    element = {"bfloat16": "13__nv_bfloat16", "int8": "a", "float32": "f"}[dtype]
    kernel = f"4scanI{element}Li{plan.group_rows}E"
    if plan.wgmma:
        slabs = -(-dim * model.ELEMENT_BYTES[dtype] // model.SLAB_BYTES)
        arch, kernel = WGMMA_ARCH, f"10scan_wgmmaI{element}Li{slabs}E"
    (used,) = (use for (target, name), use in resources.items() if target == arch and kernel in name)
    assert used["SHARED"] == (0 if arch == "80" else 1024)  # no static arrays; the system's part
    assert plan.shared_bytes <= device.shared_bytes_per_block
    assert (
        plan.shared_bytes + 1024
    ) * plan.blocks_per_multiprocessor <= device.shared_bytes_per_multiprocessor
    assert used["REG"] * SCAN_THREADS * plan.blocks_per_multiprocessor <= REGISTERS


@pytest.fixture(scope="module")
def machine_code(cuobjdump):
    """(target, pattern) -> {function: its instructions} of the functions whose name has the pattern."""
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.M)

    def functions(arch):
        parts = re.split(r"^\s*Function : (\S+)$", cuobjdump("-sass", "-arch", f"sm_{arch}"), flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    targets = (*ARCHS, WGMMA_ARCH)
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(targets, pool.map(functions, targets)))

    def select(arch, pattern):
        return {name: instruction.findall(body) for name, body in found[arch].items() if pattern.search(name)}

    return select


def opcodes_of(code):
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in code]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_scan_in_machine_code(machine_code, arch):
    scans = machine_code(arch, SCAN)
    assert len(scans) == 2 * len(MATRIX_INSTRUCTION)
    for name, code in scans.items():
        element, rows = SCAN.search(name).groups()
        rows, pattern = int(rows), MATRIX_INSTRUCTION[element]
        opcodes = opcodes_of(code)
        assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes), name
        # Global to shared memory, 128 bits at a time, past L1 and registers.
        copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
        assert copies, name
        assert all(".128" in opcode for opcode in copies), name
        at = [i for i, opcode in enumerate(opcodes) if re.match(pattern, opcode)]
        loop = opcodes[at[0] : at[-1] + 1]
        if element == "f":
            # rows / 8 x 4 scores a thread, four dimensions a chunk; other FMAs stand outside the loop.
            assert len(at) >= rows // 8 * 4 * 4, name
            assert sum(opcode == "LDS.128" for opcode in opcodes) >= rows // 8 + 4, name
            continue
        # rows / 32 x 4 fragments in each of a slab's four steps, fed by ldmatrix.
        assert len(at) == rows // 32 * 4 * 4, name
        assert sum(opcode.startswith("LDSM.16.M88.4") for opcode in opcodes) == 4 * (rows // 32 + 2), name
        others = [x for x in loop if not re.match(pattern, x) and not x.startswith("LDSM")]
        assert len(others) <= len(at), f"{name}: {len(others)} other instructions among {len(at)} products"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_chunk_kernels_in_machine_code(machine_code, arch):
    """16 bytes a load of logits; of their gradients 16 bytes a store, 8 where they are halves."""
    found = machine_code(arch, CHUNK)
    assert len(found) == 2 + 4
    for name, code in found.items():
        kernel, out = CHUNK.search(name).groups()
        opcodes = opcodes_of(code)
        assert any(opcode.startswith("LDG.E.128") for opcode in opcodes), name
        if kernel == "dlogits":
            assert sum(opcode.startswith("LDG.E.128") for opcode in opcodes) == 4, name
            width = r"STG\.E\.64" if out in HALVES else r"STG\.E\.128"
            stores = [opcode for opcode in opcodes if opcode.startswith("STG")]
            assert len(stores) == 4, name
            assert all(re.match(width, opcode) for opcode in stores), (name, stores)


def test_hoppers_scan_in_machine_code(machine_code):
    """Products in batches that run on while the batch before is filtered: no wait after each of them."""
    found = machine_code(WGMMA_ARCH, WGMMA_SCAN)
    assert len(found) == 2 * len(WGMMA_SLABS)
    for name, code in found.items():
        element, slabs = WGMMA_SCAN.search(name).groups()
        lines = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in code]
        opcodes = [line.split()[0] for line in lines]
        assert not any(opcode.startswith(("LDL", "STL", "HMMA", "LDGSTS")) for opcode in opcodes), name
        kind = r"HGMMA\.64x128x16\.F32" + (r"\.BF16$" if element.startswith("13") else "$")
        products = [line for line in lines if re.match(kind, line.split()[0])]
        batch = 4 * int(slabs)
        # A round's four steps; the first product of each starts from zero, the last closes its group.
        assert len(products) == WGMMA_ROUND_STEPS * batch, name
        for i, line in enumerate(products):
            assert ("RZ, !UPT" in line) == (i % batch == 0), f"{name}: {line}"
            assert ("gsb0" in line) == (i % batch == batch - 1), f"{name}: {line}"
        waits = [line.split()[-1] for line in lines if line.startswith("WARPGROUP.DEPBAR")]
        assert waits == ["0x1"] * (WGMMA_ROUND_STEPS - 1) + ["0x0"], f"{name}: {waits}"
        assert opcodes.count("WARPGROUP.ARRIVE") == WGMMA_ROUND_STEPS, name
        # Rows come by the copy engine, in boxes.
        assert sum(opcode == "UTMALDG.2D" for opcode in opcodes) >= int(slabs) + 1, name
        assert any(opcode.startswith("SYNCS.PHASECHK") for opcode in opcodes), name
