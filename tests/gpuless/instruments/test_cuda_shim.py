# SPDX-License-Identifier: Apache-2.0
"""The shim that executes CUDA kernels on the CPU: against the PTX ISA, and that it finds the mistakes it is
there to find: `pytest -m full tests/gpuless/instruments/test_cuda_shim.py`."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_shim.build import SHIM, build, environment, missing

pytestmark = pytest.mark.full

SOURCE = SHIM / "selftest.cu"
RANDOM = np.random.default_rng(0)
NAN = 0xFFFFFFFF  # what shared memory holds before anything is written
INVALID_VALUE, INVALID_DEVICE, NO_DEVICE, LAUNCH_FAILURE = 1, 101, 100, 719


class Shim:
    """The library made of SOURCE."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("run", "error_string", "fastnegate_shim_last_error"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("fastnegate_shim_launches", "fastnegate_shim_count"):
            getattr(self.library, name).restype = ctypes.c_int64

    def launch(
        self, kernel: str, words: object = (), out: int = 0, *, grid: object = 1, block: object = 32,
        shared: int = 0,
    ) -> tuple[np.ndarray, str | None]:  # fmt: skip
        """`out` words of output, and what went wrong."""
        given = np.ascontiguousarray(words, np.uint32)
        result = np.zeros(out, np.uint32)
        sizes = [
            (ctypes.c_uint * 3)(*size, *[1] * (3 - len(size)))
            for size in (np.atleast_1d(grid).tolist(), np.atleast_1d(block).tolist())
        ]
        error = self.library.run(
            kernel.encode(), given.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p),
            given.size, *sizes, ctypes.c_size_t(shared),
        )  # fmt: skip
        return result, error and error.decode()

    def run(self, kernel: str, words: object = (), out: int = 0, **sizes: object) -> np.ndarray:
        result, error = self.launch(kernel, words, out, **sizes)
        assert error is None, error
        return result

    def error(self, kernel: str, words: object = (0,) * 256, out: int = 256, **sizes: object) -> str | None:
        return self.launch(kernel, words, out, **sizes)[1]

    def count(self, field: str) -> int:
        last = self.library.fastnegate_shim_launches() - 1
        return self.library.fastnegate_shim_count(ctypes.c_int64(last), field.encode())

    def set(self, field: str, value: int) -> None:
        assert self.library.fastnegate_shim_set(field.encode(), ctypes.c_int64(value)) == 0

    def fail_next(self, function: str, error: int) -> int:
        return self.library.fastnegate_shim_fail_next(function.encode(), error)

    def ask(self, function: str, *arguments: int) -> tuple[int, int]:
        """The error and what was written through the pointer that comes first."""
        value = ctypes.c_int(-1)
        error = getattr(self.library, function)(ctypes.byref(value), *arguments)
        return error, value.value


def _build(factory: pytest.TempPathFactory, name: str, **options: object) -> Path:
    reason = missing(options.get("sanitize"))
    if reason:
        pytest.skip(reason)
    return build([SOURCE], factory.mktemp("shim") / name, **options)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(_build(tmp_path_factory, "selftest.so"))


@pytest.fixture
def shim(library: Shim) -> Iterator[Shim]:
    library.library.fastnegate_shim_reset()
    yield library


def execute(program: Path, sanitize: str | None, *kernels: str) -> tuple[int, str]:
    done = subprocess.run([program, *kernels], env=environment(sanitize), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# ---- numbers --------------------------------------------------------------------------------------

SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-45,
    -1e-40,
    2.0**-126,
    -(2.0**-126),
    2.0**126,
    2.0**127,
    3.4e38,
]
FLOATS = np.concatenate(
    [RANDOM.standard_normal(500) * np.exp2(RANDOM.integers(-140, 127, 500).astype(float)), SPECIAL]
).astype(np.float32)
TINY = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


def equal(a: np.ndarray, b: np.ndarray) -> None:
    """The same bits, or both NaN."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))
    np.testing.assert_array_equal(a, b)


def test_exp2(shim: Shim) -> None:
    x = np.concatenate([FLOATS, RANDOM.uniform(-150, 130, 500), [-126, -126.001, 127.9, 128]]).astype(
        np.float32
    )
    y = shim.run("exp2", x.view(np.uint32), x.size).view(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp2(x.astype(np.float64))
    zero, finite = exact < 2.0**-126, exact < 3.4e38
    assert (y[zero] == 0).all() and not np.signbit(y[zero]).any()
    np.testing.assert_allclose(y[finite & ~zero], exact[finite & ~zero], rtol=2.0**-22)
    assert np.isnan(y[np.isnan(x)]).all() and (y[x >= 128] == np.inf).all()
    assert shim.count("exp2") == x.size


def test_reciprocal_and_root(shim: Shim) -> None:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        expected = np.float32(1) / FLOATS, np.sqrt(FLOATS)
    for name, y in zip(("reciprocal", "sqrt"), expected):
        equal(shim.run(name, FLOATS.view(np.uint32), FLOATS.size).view(np.float32), y)


# Ties to even, what rounds to inf and what just does not, smallest subnormal numbers.
HALF = [
    65504,
    65519.996,
    65520,
    1 + 2.0**-11,
    1 + 3 * 2.0**-11,
    2.0**-24,
    2.0**-25,
    2.0**-25 * 1.001,
    2.0**-14,
]
HALF += [2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-26, 3 * 2.0**-25]
BRAIN = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.3895314e38, 3.39e38, 3.4028235e38, 2.0**-133, 2.0**-134]


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Rounded by way of float64, for which the neighbour in bfloat16 is a number 2^-8 to 2^-7 away."""
    word = x.astype(np.float32).view(np.uint32)
    low, high = word >> 16, (word >> 16) + 1
    with np.errstate(invalid="ignore"):
        value = [(bits << 16).astype(np.uint32).view(np.float32).astype(np.float64) for bits in (low, high)]
        value = [np.where(np.isinf(v), np.copysign(2.0**128, v), v) for v in value]
        distance = [np.abs(v - x.astype(np.float64)) for v in value]
        up = (distance[1] < distance[0]) | ((distance[1] == distance[0]) & (low % 2 == 1))
    return np.where(up & np.isfinite(x), high, low)


@pytest.mark.parametrize("dtype, special", [("float16", HALF), ("bfloat16", BRAIN)])
def test_pack(shim: Shim, dtype: str, special: list[float]) -> None:
    x = np.concatenate([FLOATS, special, -np.array(special), RANDOM.standard_normal(2000)]).astype(np.float32)
    y = shim.run(f"pack_{dtype}", x.view(np.uint32), x.size)
    with np.errstate(over="ignore"):
        low = x.astype(np.float16).view(np.uint16) if dtype == "float16" else bfloat16_bits(x)
    low = np.where(np.isnan(x), 0x7FFF, low)
    np.testing.assert_array_equal(y & 0xFFFF, low)
    assert (y >> 16 == (0x3C00 if dtype == "float16" else 0x3F80)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unpack(shim: Shim, dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    words = np.concatenate([[0x3C00_0000 if dtype == "float16" else 0x3F80_0000], bits]).astype(np.uint32)
    high, *low = shim.run(f"unpack_{dtype}", words, words.size).view(np.float32)
    assert high == 1
    exact = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    equal(np.array(low), exact if dtype == "float16" else (bits << 16).view(np.float32))


# ---- matrices -------------------------------------------------------------------------------------
# Fragments: PTX ISA 9.0, 9.7.14.5.7 and .8 (mma.m16n8k8, .m16n8k16) and 9.7.14.5.15 (ldmatrix).

GROUP, PLACE = np.arange(32) // 4, np.arange(32) % 4


def stored(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The bits of x in `dtype`, and their values as float32."""
    if dtype == "float16":
        half = x.astype(np.float16)
        return half.view(np.uint16).astype(np.uint32), half.astype(np.float32)
    bits = x.astype(np.float32).view(np.uint32) >> 16
    return bits, (bits << 16).view(np.float32)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low | high << 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("k", [16, 8])
def test_multiply(shim: Shim, k: int, dtype: str) -> None:
    shapes = ((16, k), (k, 8))
    for a, b in (
        [RANDOM.standard_normal(shape) for shape in shapes],
        [RANDOM.standard_normal(shape) * 2.0**-14 for shape in shapes],  # subnormal in float16
        [np.where(RANDOM.random(shape) < 0.02, np.inf, 1.0) for shape in shapes],
    ):
        d = RANDOM.standard_normal((16, 8)).astype(np.float32)
        (a_bits, a), (b_bits, b) = stored(a, dtype), stored(b, dtype)
        g, t = GROUP, 2 * PLACE
        registers = [
            pair(a_bits[g + row, t + column], a_bits[g + row, t + column + 1])
            for column in range(0, k, 8)
            for row in (0, 8)
        ]
        registers += [pair(b_bits[t + row, g], b_bits[t + row + 1, g]) for row in range(0, k, 8)]
        at = [(g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)]
        registers += [d[rows, columns].view(np.uint32) for rows, columns in at]
        out = shim.run(f"multiply_{k}_{dtype}", np.stack(registers, 1), 128).view(np.float32).reshape(32, 4)
        for i in range(k):  # float32 holds the products, and each sum is rounded to it
            d += a[:, i : i + 1] * b[i : i + 1]
        equal(out, np.stack([d[rows, columns] for rows, columns in at], 1))
        assert [shim.count("mma_k16"), shim.count("mma_k8")] == [int(k == 16), int(k == 8)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_load_matrices(shim: Shim, count: int, transposed: bool) -> None:
    memory = RANDOM.integers(0, 1 << 32, (64, 4), np.uint64).astype(np.uint32)
    rows = RANDOM.permutation(64)[:32]
    address = 16 * rows.astype(np.uint32)
    address[8 * count :] = 7  # of no meaning there
    name = f"load_{count}" + "_transposed" * transposed
    words = np.concatenate([address, memory.ravel()])
    out = shim.run(name, words, 32 * count, shared=1024).reshape(32, count)
    for i in range(count):
        matrix = memory.view(np.uint16)[rows[8 * i : 8 * i + 8]].astype(np.uint32)
        if transposed:
            matrix = matrix.T
        expected = pair(matrix[GROUP, 2 * PLACE], matrix[GROUP, 2 * PLACE + 1])
        np.testing.assert_array_equal(out[:, i], expected)
    assert shim.count("ldmatrix") == 1
    # The busiest of the 8 groups of 4 banks, of each matrix.
    busiest = [np.bincount(rows[8 * i : 8 * i + 8] % 8).max() - 1 for i in range(count)]
    assert shim.count("ldmatrix_conflicts") == sum(busiest)


def test_load_matrices_takes_aligned_rows_of_shared_memory(shim: Shim) -> None:
    words = np.zeros(160, np.uint32)
    words[5] = 8
    assert "thread 5 of block (0, 0, 0): ldmatrix: shared memory address not aligned" in shim.error(
        "load_4", words, 128, shared=512
    )
    message = "thread 4 of block (0, 0, 0): ldmatrix: byte 64 of 64 bytes of shared memory"
    assert shim.error("row_beyond", shared=64) == message
    assert shim.error("row_beyond", shared=16 * 16) is None  # the other lanes' addresses are not looked at


# ---- asynchronous copies --------------------------------------------------------------------------


def test_copies_arrive_when_waited_for(shim: Shim) -> None:
    lines = RANDOM.integers(1, 1 << 32, (2, 32, 4), np.uint64).astype(np.uint32)
    lines[RANDOM.random((2, 32)) < 0.3] = 0  # not present: zeros arrive, the address is null
    first, second = lines[:, :, 0]
    out = shim.run("copies", lines, 32 * 6, shared=1024).reshape(32, 6)
    nothing = np.full(32, NAN, np.uint32)
    np.testing.assert_array_equal(out, np.stack([nothing, nothing, first, nothing, first, second], 1))
    present = np.count_nonzero(lines[:, :, 0])
    assert (shim.count("copied"), shim.count("zeroed")) == (16 * present, 16 * (64 - present))
    assert shim.count("copy_conflicts") == 0


def test_bank_conflicts_of_copies(shim: Shim) -> None:
    # 32 lanes in one bank are four accesses of 8 lanes, each of 8 wavefronts; the copies that follow have no
    # conflicts, though half of the lanes do not take part in one of them.
    shim.run("copy_strided", [1, 2, 3, 4], shared=4096)
    assert shim.count("copy_conflicts") == 4 * 7


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("copy_to_byte_8", "thread 0 of block (0, 0, 0): cp.async: shared memory address not aligned"),
        ("copy_from_byte_8", "thread 0 of block (0, 0, 0): cp.async: global memory address not aligned"),
        ("copy_beyond", "thread 3 of block (0, 0, 0): cp.async: byte 16 of 24 bytes of shared memory"),
        ("copy_not_waited_for", "thread 0 of block (0, 0, 0): ends while 1 of its copies are not waited for"),
    ],
)
def test_wrong_copies(shim: Shim, kernel: str, message: str) -> None:
    words = np.zeros(8, np.uint32)  # numpy aligns to 16 bytes
    assert shim.error(kernel, words, shared=24 if kernel == "copy_beyond" else 512).startswith(message)


# ---- threads that meet ----------------------------------------------------------------------------

LANES = np.arange(32)


def test_shuffles(shim: Shim) -> None:
    x = RANDOM.integers(0, 1 << 32, 32, np.uint64).astype(np.uint32)
    out = shim.run("shuffles", x, 32 * 6).reshape(32, 6)
    segment = LANES // 8 * 8
    sources = [np.full(32, 5), LANES * 7 % 32, segment + (LANES + 1) % 8, LANES ^ 9, LANES ^ 3]
    # With segments of 4, lane ^ 6 lies in another one: from a lower one a value comes, from a higher one not.
    other = LANES ^ 6
    sources.append(np.where(other <= (LANES | 3), other, LANES))
    np.testing.assert_array_equal(out, x[np.stack(sources, 1)])
    assert shim.count("shuffles") == 6


def test_votes(shim: Shim) -> None:
    for bits in (RANDOM.integers(0, 8, 32), np.full(32, 0), np.full(32, 7), np.arange(32) == 9):
        bits = bits.astype(np.uint32)
        out = shim.run("votes", bits << 8, 96).reshape(32, 3)
        ballot = sum(int(b & 1) << lane for lane, b in enumerate(bits))
        expected = [ballot, (bits & 2).any(), (bits & 4).all()]
        np.testing.assert_array_equal(out, np.tile(np.array(expected, np.uint32), (32, 1)))
        assert shim.count("reductions") == 3


def test_reductions(shim: Shim) -> None:
    x = RANDOM.integers(0, 1 << 32, 32, np.uint64).astype(np.uint32)
    signed = x.view(np.int32)
    expected = [
        x.sum(dtype=np.uint32),
        x.min(),
        x.max(),
        *np.array([signed.min(), signed.max()]).view(np.uint32),
    ]
    out = shim.run("reductions", x, 32 * 5).reshape(32, 5)
    np.testing.assert_array_equal(out, np.tile(np.array(expected, np.uint32), (32, 1)))
    assert shim.count("reductions") == 5


def test_coordinates(shim: Shim) -> None:
    out = shim.run("coordinates", (), 24 * 64, grid=(3, 4, 2), block=(8, 4, 2)).reshape(24, 64)
    np.testing.assert_array_equal(out, 1000 * np.arange(24)[:, None] + np.arange(64))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("block", [32, 96, 1024])
def test_barriers(shim: Shim, block: int, seed: int) -> None:
    shim.set("seed", seed)
    x = np.arange(block, dtype=np.uint32)
    out = shim.run("reversed", x, 2 * 3 * block, grid=2, block=block, shared=4 * block)
    expected = x[::-1] + np.arange(3)[:, None]
    np.testing.assert_array_equal(out.reshape(2, 3, block), np.stack([expected] * 2))
    assert shim.count("barriers") == 2 * 6


def order(shim: Shim, seed: int) -> list[int]:
    shim.set("seed", seed)
    return shim.run("order", (), 1 + 2 * 128, grid=2, block=64)[1:].tolist()


def test_schedules(shim: Shim) -> None:
    in_order, one, again, other = (order(shim, seed) for seed in (0, 1, 1, 2))
    # The last lane to arrive goes on first, and is the first to arrive in the next round: 31, then 30.
    lanes = [31, *range(31), 30, 31, *range(30)]
    assert in_order == [32 * warp + lane for warp in range(4) for lane in lanes]
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(in_order)
    # Blocks change places, too, and warps take turns.
    assert {order(shim, seed)[0] // 64 for seed in range(1, 8)} == {0, 1}
    assert {thread // 32 for thread in one[:64]} in ({0, 1}, {2, 3})


@pytest.mark.parametrize("seed", [0, 3])
def test_a_schedule_changes_no_result(shim: Shim, seed: int) -> None:
    words = RANDOM.integers(0, 1 << 15, 512, np.uint32) * 65537
    sizes = {"grid": 3, "block": 128, "shared": 128 * 20}
    expected = shim.run("pipeline", words, 384, **sizes)
    shim.set("seed", seed)
    np.testing.assert_array_equal(shim.run("pipeline", words, 384, **sizes), expected)
    # A copy nobody waits for has not arrived, whatever the schedule.
    assert (shim.run("no_wait", words, 384, **sizes) != expected).any()


def test_counts(shim: Shim) -> None:
    shim.run("pipeline", np.zeros(512, np.uint32), 384, grid=3, block=128, shared=128 * 20)
    warps = 3 * 4 * 2  # in each of two rounds
    assert shim.count("ldmatrix") == shim.count("mma_k16") == shim.count("reductions") == warps
    assert (shim.count("barriers"), shim.count("copied")) == (3 * 4, 3 * 128 * 2 * 16)
    # All threads are started; at each meeting, with two __syncwarp in a round, all but the last one wait.
    assert shim.count("switches") == 3 * 128 + 31 * 5 * warps + 127 * shim.count("barriers")
    assert shim.count("nothing") == -1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "kernel, message",
    [
        ("half_leaves", "threads 0-39 at __syncthreads; threads 40-63 exited"),
        ("warps_part", "threads 0-31, 40 at __syncthreads; threads 32-39, 41-63 at __syncwarp"),
    ],
)
def test_deadlocks(shim: Shim, kernel: str, message: str, seed: int) -> None:
    message = f"deadlock in block (0, 0, 0): {message}"
    shim.set("seed", seed)
    assert shim.error(kernel, block=64) == message
    assert shim.library.fastnegate_shim_last_error() == message.encode()
    assert shim.error("reversed", block=64, shared=256) is None  # nothing of it is left


def test_divergence(shim: Shim) -> None:
    message = "thread 16 of block (0, 0, 0): at __shfl_sync, while threads 0-15 of its warp are at __syncwarp"
    assert shim.error("half_shuffles", block=64) == message
    assert "operations of whole warps only" in shim.error("half_mask")
    assert "blocks of whole warps only" in shim.error("coordinates", block=48)


def test_exceptions_of_a_kernel_come_out(shim: Shim) -> None:
    assert shim.error("kernel_throws") == "thread 0 of block (0, 0, 0): out of ideas"


# ---- the device -----------------------------------------------------------------------------------


def test_facts_of_the_device(shim: Shim) -> None:
    assert shim.ask("device_count") == (0, 1)
    numbers = {"multiprocessors": 16, "major": 75, "minor": 76, "shared": 97}  # of cudaDeviceAttr
    for value, (field, number) in enumerate(numbers.items(), 7):
        shim.set(field, value)
        assert shim.ask("attribute", number, 0) == (0, value)
    assert shim.ask("attribute", 12345, 0)[0] == INVALID_VALUE
    assert shim.ask("attribute", 16, 1)[0] == INVALID_DEVICE
    shim.set("driver", 12080)
    shim.set("runtime", 12060)
    assert (shim.ask("driver_version"), shim.ask("runtime_version")) == ((0, 12080), (0, 12060))
    assert shim.library.fastnegate_shim_set(b"colour", ctypes.c_int64(1)) == -1


def test_devices(shim: Shim) -> None:
    shim.set("count", 2)
    assert shim.library.set_device(1) == 0 and shim.ask("get_device") == (0, 1)
    assert shim.library.set_device(2) == INVALID_DEVICE
    shim.set("count", 0)
    assert shim.ask("device_count") == (NO_DEVICE, 0)
    assert shim.error("coordinates") == "cudaErrorNoDevice"


def test_shared_memory_beyond_48_kib_is_asked_for(shim: Shim) -> None:
    limit = 99 << 10
    shim.set("shared", limit)
    shim.set("count", 2)
    allow = shim.library.allow_shared
    assert shim.error("coordinates", shared=48 << 10) is None
    assert shim.error("coordinates", shared=(48 << 10) + 1) == "cudaErrorInvalidValue"
    assert allow(b"coordinates", limit + 1) == INVALID_VALUE
    assert shim.library.allowed_shared(b"coordinates") == 48 << 10
    assert allow(b"coordinates", limit) == 0 and shim.library.allowed_shared(b"coordinates") == limit
    assert shim.error("coordinates", shared=limit) is None
    assert shim.error("coordinates", shared=limit + 1) == "cudaErrorInvalidValue"
    # It holds for one kernel on one device.
    assert shim.error("order", shared=limit) == "cudaErrorInvalidValue"
    assert shim.library.set_device(1) == 0
    assert shim.error("coordinates", shared=limit) == "cudaErrorInvalidValue"


@pytest.mark.parametrize(
    "sizes",
    [
        {"block": 1056},
        {"block": (32, 32, 2)},
        {"block": 0},
        {"grid": 0},
        {"grid": (1, 65536)},
        {"grid": (1, 1, 65536)},
    ],
)
def test_launches_too_large(shim: Shim, sizes: dict[str, object]) -> None:
    assert shim.error("coordinates", **sizes) == "cudaErrorInvalidConfiguration"


def test_failures_on_demand(shim: Shim) -> None:
    library = shim.library
    calls = {
        "cudaGetDeviceCount": lambda: shim.ask("device_count")[0],
        "cudaGetDevice": lambda: shim.ask("get_device")[0],
        "cudaSetDevice": lambda: library.set_device(0),
        "cudaDeviceGetAttribute": lambda: shim.ask("attribute", 16, 0)[0],
        "cudaFuncSetAttribute": lambda: library.allow_shared(b"order", 0),
        "cudaDriverGetVersion": lambda: shim.ask("driver_version")[0],
        "cudaRuntimeGetVersion": lambda: shim.ask("runtime_version")[0],
    }
    for name, call in calls.items():
        assert shim.fail_next(name, LAUNCH_FAILURE) == 0
        assert (call(), call()) == (LAUNCH_FAILURE, 0), name  # once
        assert library.peek_at_last_error() == library.get_last_error() == LAUNCH_FAILURE
        assert library.get_last_error() == 0
    assert shim.fail_next("cudaLaunchKernel", LAUNCH_FAILURE) == 0
    assert shim.error("coordinates") == "cudaErrorLaunchFailure"
    assert shim.error("coordinates") is None
    assert library.error_string(LAUNCH_FAILURE) == b"unspecified launch failure"
    assert shim.fail_next("cudaStreamCreate", 2) == -1


# ---- sanitizers -----------------------------------------------------------------------------------

# One after the other in one process: what a kernel leaves behind that failed must not disturb the next.
FAILING = [
    "pipeline",
    "half_leaves",
    "half_shuffles",
    "copy_not_waited_for",
    "warps_part",
    "kernel_throws",
    "pipeline",
]


def right(output: str) -> bool:
    lines = output.splitlines()
    done = [line.endswith(": done") for line in lines]
    return [line.split(":")[0] for line in lines] == FAILING and done == [x == "pipeline" for x in FAILING]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory, "selftest", sanitize="address")


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory, "selftest", sanitize="thread")


def test_other_processors(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = _build(tmp_path_factory, "selftest", flags=["-DFASTNEGATE_SHIM_UCONTEXT"])
    code, output = execute(program, None, *FAILING)
    assert code == 0 and right(output), output


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing_in_what_is_right(sanitize: str, request: pytest.FixtureRequest) -> None:
    program = request.getfixturevalue(sanitize)
    code, output = execute(program, sanitize, *FAILING)
    assert code == 0 and right(output), output
    code, output = execute(program, sanitize, "reversed", "copy_in_turn", "coordinates")
    assert code == 0 and output.count(": done") == 3, output


@pytest.mark.parametrize(
    "kernel, access",
    [
        ("reads_beyond", "READ of size 4"),
        ("copies_beyond", "READ of size 8"),
        ("writes_beyond", "WRITE of size 4"),
    ],
)
def test_address_sanitizer_finds_overruns(address: Path, kernel: str, access: str) -> None:
    code, output = execute(address, "address", kernel)
    assert code != 0 and "heap-buffer-overflow" in output and access in output, output
    assert f"in {kernel} {SOURCE}" in output, output


def test_address_sanitizer_finds_misaligned_vectors(address: Path) -> None:
    code, output = execute(address, "address", "writes_misaligned")
    assert code != 0 and f"{SOURCE.name}:" in output and "misaligned address" in output, output


@pytest.mark.parametrize(
    "kernel",
    ["no_first_barrier", "no_last_barrier", "no_first_syncwarp", "no_last_syncwarp", "blocks_meet"],
)
def test_thread_sanitizer_finds_races(thread: Path, kernel: str) -> None:
    code, output = execute(thread, "thread", kernel)
    assert code == 66 and "WARNING: ThreadSanitizer: data race" in output, output
    assert str(SOURCE) in output and "in fastnegate::shim::begin_copy" not in output, output
