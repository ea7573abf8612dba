"""The emulated device itself: its warps, products and copies are CUDA's, and a kernel that is wrong only sometimes is found."""

import numpy as np
import pytest
from emulated import DoesNotCompile, Emulated, EmulationError
from refmodels_cupy.device import Launch

from refmodels.ops.precision import numpy_dtype


def run(compiled, body, *arrays, threads=32, shared=0, orders=(0, 1, 2)):
    """Launch a kernel with this body, whose arrays are x0, x1 ... of 32-bit numbers and T those of `T`; one block."""
    parameters = ", ".join(f"{'float' if array.dtype == np.float32 else 'int'}* x{i}" for i, array in enumerate(arrays))
    source = f'#include "device.cuh"\ntemplate <class T>\n__global__ void planted({parameters}) {{\n{body}\n}}\n'
    device = Emulated(compiled, orders=orders, sources={"planted.cu": source})
    device.launch(Launch("planted.cu", "planted<bf16>", (1, 1, 1), (threads, 1, 1), arrays, shared))


def lanes(dtype=np.int32, count=32):
    return np.zeros(count, dtype)


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("__shfl_xor_sync(ALL_LANES, l * 3, 5)", [3 * (lane ^ 5) for lane in range(32)]),
        ("__shfl_sync(ALL_LANES, l * 3, 7)", [21] * 32),
        ("__shfl_down_sync(ALL_LANES, l * 3, 4)", [3 * (lane + 4 if lane < 28 else lane) for lane in range(32)]),
        ("__shfl_up_sync(ALL_LANES, l * 3, 4)", [3 * (lane - 4 if lane >= 4 else lane) for lane in range(32)]),
        ("int(__ballot_sync(ALL_LANES, l % 3 == 2 && l < 31))", [sum(1 << lane for lane in range(2, 31, 3))] * 32),
        ("__ffs(l)", [(lane & -lane).bit_length() for lane in range(32)]),
    ],
)
def test_operations_of_a_warp(compiled, operation, wanted):
    found = lanes()
    run(compiled, f"int l = threadIdx.x; x0[l] = {operation};", found)
    assert found.tolist() == wanted


def test_lanes_that_are_not_in_the_mask(compiled):
    found = lanes()
    run(compiled, "int l = threadIdx.x; if (l < 16) x0[l] = __shfl_xor_sync(0xffffu, l, 1);", found)
    assert found.tolist() == [lane ^ 1 for lane in range(16)] + [0] * 16
    with pytest.raises(EmulationError, match="the mask lacks the lane itself"):
        run(compiled, "int l = threadIdx.x; x0[l] = __shfl_xor_sync(0xffffu, l, 1);", found)
    with pytest.raises(EmulationError, match="a value of lane 16, which is not in the mask"):
        run(compiled, "int l = threadIdx.x; if (l < 16) x0[l] = __shfl_sync(0xffffu, l, 16);", found)
    run(compiled, "int l = threadIdx.x; if (l < 16) x0[l] = int(__ballot_sync(0xffffu, l == 3));", found)
    assert found.tolist() == [8] * 16 + [0] * 16


@pytest.mark.parametrize(("half", "dtype"), [("f16", "float16"), ("bf16", "bfloat16")])
def test_a_matrix_product_of_a_warp(compiled, half, dtype):
    """Operands laid out as PTX says, by arithmetic and by ldmatrix, against NumPy."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(numpy_dtype(dtype)) for shape in ((16, 16), (16, 8)))
    c = np.zeros((16, 8), np.float32)
    body = f"""
    int l = threadIdx.x;
    auto a = reinterpret_cast<const uint32_t*>(x0);  // [16][8] pairs
    auto b = reinterpret_cast<const uint16_t*>(x1);  // [16][8]
    uint32_t parts[4], columns[2];
    for (int i = 0; i < 4; ++i) parts[i] = a[(l / 4 + i % 2 * 8) * 8 + l % 4 + i / 2 * 4];
    for (int i = 0; i < 2; ++i) {{
        int row = 2 * (l % 4) + 8 * i, column = l / 4;
        columns[i] = b[row * 8 + column] | uint32_t(b[(row + 1) * 8 + column]) << 16;
    }}
    SHARED(uint4, tile, [32]);  // a's rows of 16 bytes, two beside each other
    tile[l] = reinterpret_cast<const uint4*>(x0)[l];
    __syncwarp();
    uint32_t loaded[4], transposed[4];
    load_matrices(loaded, &tile[l % 16 * 2 + l / 16]);
    for (int i = 0; i < 4; ++i) x3[l] += loaded[i] != parts[i];
    __syncwarp();
    tile[l] = reinterpret_cast<const uint4*>(x1)[l % 16];
    __syncwarp();
    load_transposed_matrices(transposed, &tile[l]);
    for (int i = 0; i < 2; ++i) x3[l] += transposed[i] != columns[i];
    float sums[4] = {{}};
    mma_16x8x16<{half}>(sums, parts, columns);
    for (int i = 0; i < 4; ++i) x2[(l / 4 + i / 2 * 8) * 8 + 2 * (l % 4) + i % 2] = sums[i];
    """
    different = lanes()
    run(compiled, body, a.view(np.int32), b.view(np.int32), c, different)
    assert not different.any()
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-5, atol=1e-5)


COPY = """
    DYNAMIC_SHARED(uint4, tile);
    int i = threadIdx.x;
    copy_16_async(&tile[i], reinterpret_cast<const uint4*>(x0) + i, i < 31);
    {wait}
    __syncthreads();
    x1[i] = int(tile[31 - i].w);
"""


def test_a_copy_is_there_when_it_is_awaited_and_not_before(compiled):
    given, found = np.arange(128, dtype=np.int32), lanes()
    run(compiled, COPY.format(wait="await_copies();"), given, found, shared=512)
    assert found.tolist() == [0, *range(123, 0, -4)]
    with pytest.raises(EmulationError, match=r"cp\.async: a copy that nobody awaits"):
        run(compiled, COPY.format(wait=""), given, found, shared=512)
    with pytest.raises(EmulationError, match="what shared memory held before"):
        run(compiled, COPY.format(wait="") + "await_copies();", given, found, shared=512)
    with pytest.raises(EmulationError, match=r"cp\.async: its place was written to while the copy was under way"):
        run(compiled, COPY.format(wait="tile[i].x = 7; await_copies();"), given, found, shared=512)
    with pytest.raises(EmulationError, match=r"cp\.async: an address that is no multiple of 16"):
        run(compiled, COPY.format(wait="await_copies();").replace("(x0) + i", "(x0 + i)"), given, found, shared=512)


def test_groups_of_copies(compiled):
    """Of two groups the first is awaited: the second is not there yet."""
    body = """
    DYNAMIC_SHARED(uint4, tile);
    auto from = reinterpret_cast<const uint4*>(x0);
    copy_16_async(&tile[0], from, true);
    close_copies();
    copy_16_async(&tile[1], from + 1, true);
    close_copies();
    await_copies<1>();
    x1[0] = int(tile[0].x), x1[1] = tile[1].x == 5;
    await_copies<0>();
    x1[2] = int(tile[1].x);
    """
    found = lanes(count=3)
    run(compiled, body, np.arange(1, 9, dtype=np.int32), found, threads=1, shared=32)
    assert found.tolist() == [1, 0, 5]


def test_blocks_and_threads_have_their_places(compiled):
    source = """#include "device.cuh"
    template <class T>
    __global__ void planted(T* x) {
        int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        x[block * 24 + thread] += T(block * 24 + thread);
    }"""
    found = lanes(count=24 * 24)
    launch = Launch("planted.cu", "planted<int>", (2, 3, 4), (4, 3, 2), (found,))
    Emulated(compiled, sources={"planted.cu": source}).launch(launch)
    assert found.tolist() == list(range(24 * 24))


# -- planted faults -----------------------------------------------------------------------------------------------------------

REVERSED = """
    SHARED(int, kept, [64]);
    int i = threadIdx.x;
    kept[i] = x0[i];
    {barrier}
    x0[i] = kept[63 - i];
"""


def test_a_missing_barrier_is_found(compiled):
    found = np.arange(64, dtype=np.int32)
    run(compiled, REVERSED.format(barrier="__syncthreads();"), found, threads=64)
    assert found.tolist() == list(range(63, -1, -1))
    for barrier in ("", "__syncwarp();"):
        with pytest.raises(EmulationError, match="depends on the order of the threads"):
            run(compiled, REVERSED.format(barrier=barrier), found, threads=64)


def test_a_warp_that_writes_where_a_slower_one_reads_is_found(compiled):
    body = """
    SHARED(int, kept, [64]);
    int i = threadIdx.x;
    kept[i] = x0[i];
    __syncthreads();
    int sum = __shfl_xor_sync(ALL_LANES, kept[63 - i], 1);
    {barrier}
    kept[i] = -1;
    x0[i] = sum;
    """
    found = np.arange(64, dtype=np.int32)
    run(compiled, body.format(barrier="__syncthreads();"), found, threads=64)
    assert found.tolist() == [63 - (i ^ 1) for i in range(64)]
    with pytest.raises(EmulationError, match="depends on the order of the threads"):
        run(compiled, body.format(barrier=""), found, threads=64)


LAST = """#include "device.cuh"
template <class T>
__global__ void planted(int* parts, int* arrived, int* sums) {
    SHARED(int, before, [1]);
    parts += blockIdx.y * gridDim.x * 64;
    parts[blockIdx.x * 64 + threadIdx.x] = 1;
    __threadfence();
    BARRIER
    if (threadIdx.x == 0) before[0] = atomicAdd(arrived + blockIdx.y, 1);
    __syncthreads();
    if (before[0] + 1 != int(gridDim.x)) return;
    int sum = 0;
    for (int i = 0; i < int(gridDim.x) * 64; ++i) sum += parts[i];
    sums[blockIdx.y * 64 + threadIdx.x] = sum;
}"""


def test_a_block_that_is_counted_before_it_has_written_is_found(compiled):
    """Blocks run at the same time: another may be the last, and read what is not there yet."""
    for barrier in ("__syncthreads();", ""):
        arrays = [np.zeros(count, np.int32) for count in (5 * 3 * 64, 5, 5 * 64)]
        device = Emulated(compiled, sources={"planted.cu": LAST.replace("BARRIER", barrier)})
        launch = Launch("planted.cu", "planted<int>", (3, 5, 1), (64, 1, 1), tuple(arrays))
        if barrier:
            device.launch(launch)
            assert arrays[2].tolist() == [3 * 64] * (5 * 64)
        else:
            with pytest.raises(EmulationError, match="depends on the order of the threads"):
                device.launch(launch)


def test_each_order_finds_what_another_does_not(compiled):
    """A thread that reads what its neighbour writes is right if that had its turn before: rising, or falling."""
    body = """
    SHARED(int, kept, [32]);
    int i = threadIdx.x, other = (i + {neighbour}) % 32;
    kept[i] = i;
    x0[i] = kept[other] == other;
    """
    for neighbour, right in ((31, 0), (1, 1)):
        sums = {}
        for order in (0, 1, 2):
            found = lanes()
            run(compiled, body.format(neighbour=neighbour), found, orders=(order,))
            sums[order] = found.sum()
        assert sums[right] == 31
        assert sums[1 - right] == 1
        assert 1 < sums[2] < 31


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "if (threadIdx.x < 40) __syncthreads(); else __syncwarp();",
            "deadlock: 64 threads wait, 40 of them at the barrier planted.cu:4",
        ),
        (
            "if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();",
            "__syncthreads at planted.cu:7 while others wait at planted.cu:5",
        ),
        ("if (threadIdx.x % 2) __shfl_sync(ALL_LANES, 0, 0);", "deadlock: 32 threads wait, 0 of them at the barrier"),
        ("if (threadIdx.x % 2)\n__syncwarp();\nelse\n__shfl_sync(ALL_LANES, 0, 0);", "while others of the warp wait at"),
    ],
)
def test_threads_that_part_at_a_barrier_are_found(compiled, body, said):
    with pytest.raises(EmulationError, match=said):
        run(compiled, body + " x0[threadIdx.x] = 0;", lanes(count=64), threads=64)


def test_threads_that_have_ended_are_not_waited_for(compiled):
    found = lanes()
    run(compiled, "if (threadIdx.x < 5) return; __syncthreads(); x0[threadIdx.x] = 1;", found)
    assert found.tolist() == [0] * 5 + [1] * 27


def test_one_function_with_two_sizes_of_shared_memory_is_found(compiled):
    body = "x0[threadIdx.x] = block_sum<32>(1.0f) + block_sum<64>(1.0f);"
    with pytest.raises(EmulationError, match="in another instance of its function"):
        run(compiled, body, lanes(np.float32))


def test_an_array_that_is_not_contiguous_is_refused(compiled):
    with pytest.raises(EmulationError, match="not contiguous"):
        run(compiled, "x0[threadIdx.x] = 0;", lanes(count=64)[::2])


@pytest.mark.parametrize(
    ("grid", "block"),
    [((1, 65536, 1), (1, 1, 1)), ((1, 1, 65536), (1, 1, 1)), ((2**31, 1, 1), (1, 1, 1)), ((0, 1, 1), (1, 1, 1)),
     ((1, 1, 1), (1025, 1, 1))],
)  # fmt: skip
def test_a_launch_that_no_gpu_takes_is_refused(compiled, grid, block):
    with pytest.raises(EmulationError, match="no GPU has a grid of"):
        Emulated(compiled).launch(Launch("planted.cu", "planted<int>", grid, block, ()))


def test_more_shared_memory_than_every_gpu_has_is_found(compiled):
    body = "DYNAMIC_SHARED(int, all); SHARED(int, more, [8]); more[0] = all[0] = 1; x0[threadIdx.x] = more[0];"
    run(compiled, body, lanes(), shared=99 * 1024 - 32)
    with pytest.raises(EmulationError, match="101380 bytes of shared memory, and a block has 101376 on some GPUs"):
        run(compiled, body, lanes(), shared=99 * 1024 - 28)


def test_a_source_that_does_not_compile(compiled):
    with pytest.raises(DoesNotCompile, match=r"planted\.cu:4"):
        run(compiled, "nonsense;", lanes())
