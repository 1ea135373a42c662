"""The C++ operators against float64, and what is said when they are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blipfast.errors import BackendError, ShapeError
from blipfast.ops import _native
from blipfast.ops.attention import varlen_attention, varlen_attention_reference
from blipfast.ops.packing import Packing

# A machine without cmake or a compiler has no library; the loader's own tests run everywhere.
needs_library = pytest.mark.skipif(
    _native.why_not() is not None, reason=f"no native library: {_native.why_not()}"
)
# (rows, key blocks, width): one of each, nothing a multiple of a tile, more than one row tile.
SHAPES = [
    (1, [1], 1),
    (5, [33], 40),
    (16, [256], 32),
    (33, [90, 3000], 100),
    (90, [7, 1, 2500], 256),
    (530, [700], 64),
]

# Texts of each kind: empty, of one token, longer than a vector of keys.
RAGGED = [[3], [1, 1], [5, 2, 7, 1], [4, 0, 6], [0, 0, 3], [1] * 40, [32, 17, 16, 15]]


def exact(rows: Tensor, keys: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    scores = rows.double() @ keys.double().T / temperature.double()
    return scores.logsumexp(1), scores.softmax(1) @ keys.double()


def plain(rows: Tensor, keys: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    scores = rows @ keys.T / temperature.to(rows.dtype)
    return scores.logsumexp(1), scores.softmax(1) @ keys


def features(count: int, width: int, dtype: torch.dtype, length: float = 1.0) -> Tensor:
    return (length * torch.nn.functional.normalize(torch.randn(count, width), dim=1)).to(dtype)


def assert_as_good_as_plain(rows: Tensor, blocks: list[Tensor], temperature: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one rounding in fp32."""
    keys = torch.cat(blocks)
    found = _native.native_online_softmax(rows, None, temperature, blocks)
    expected, true_values = plain(rows, keys, temperature), exact(rows, keys, temperature)
    for index, name in enumerate(("lse", "mean")):
        ours, theirs, true = found[index], expected[index], true_values[index]
        assert ours.dtype == torch.float32
        # What is averaged, or summed up to the lse, sets the size of a rounding.
        size = true if name == "lse" else keys
        rounding = torch.finfo(torch.float32).eps * float(size.abs().max())
        allowed = 2 * float((theirs - true).abs().max()) + rounding
        error = float((ours - true).abs().max())
        assert error <= allowed, f"{name}: {error} > {allowed}"


@needs_library
@pytest.mark.parametrize("amx", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_online_softmax(
    shape: tuple[int, list[int], int],
    dtype: torch.dtype,
    amx: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(_native.AMX_ENV_VAR, amx)
    num_rows, sizes, width = shape
    blocks = [features(size, width, dtype) for size in sizes]
    assert_as_good_as_plain(features(num_rows, width, dtype), blocks, torch.tensor(0.07))


@needs_library
@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores_of_any_size(dtype: torch.dtype, temperature: float) -> None:
    # At 0.001 the scores reach 1,000 and a new peak makes all that came before vanish.
    keys = features(2100, 48, dtype)
    rows = keys[-20:].clone()
    assert_as_good_as_plain(rows, [keys], torch.tensor(temperature))
    assert_as_good_as_plain(rows, [keys], torch.tensor(-temperature))


@needs_library
def test_teacher_rows_follow_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    query, teacher = features(6, 32, torch.float32), features(6, 32, torch.float32)
    keys, temperature = features(50, 32, torch.float32), torch.tensor(0.1)
    lse, mean = _native.native_online_softmax(query, teacher, temperature, [keys])
    for part, rows in ((slice(0, 6), query), (slice(6, 12), teacher)):
        true_lse, true_mean = exact(rows, keys, temperature)
        torch.testing.assert_close(lse[part].double(), true_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean[part].double(), true_mean, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mixed_and_strided_inputs(dtype: torch.dtype) -> None:
    query = features(32, 8, dtype).T  # not contiguous
    keys = features(64, 32, torch.float32).repeat(1, 2)[:, ::2]
    lse, mean = _native.native_online_softmax(query, None, torch.tensor([0.2]), [keys])
    true_lse, true_mean = exact(query, keys, torch.tensor(0.2))
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loss_and_its_gradients(dtype: torch.dtype) -> None:
    """Loss and gradients of query and temperature made from the two results (ALBEF eq. 6)."""
    num_rows, alpha = 12, 0.4
    query, teacher, keys = (features(n, 64, dtype) for n in (num_rows, num_rows, 1500))
    temperature = torch.tensor(0.1)
    q = query.double().requires_grad_()
    t = temperature.double().requires_grad_()
    scores = q @ keys.double().T / t
    soft = torch.softmax(teacher.double() @ keys.double().T / t.detach(), 1)
    targets = alpha * soft + (1 - alpha) * torch.eye(num_rows, 1500, dtype=torch.float64)
    loss = -(targets * scores.log_softmax(1)).sum(1)
    loss.sum().backward()
    assert q.grad is not None
    assert t.grad is not None

    lse, mean = _native.native_online_softmax(query, teacher, temperature, [keys])
    target = alpha * mean[num_rows:] + (1 - alpha) * keys[:num_rows].float()
    ours = lse[:num_rows] - (query.float() * target).sum(1) / temperature
    d_query = (mean[:num_rows] - target) / temperature
    d_temperature = -(query.float() * d_query).sum() / temperature
    rtol = 1e-5 if dtype == torch.float32 else 2e-3  # bf16 rounds the weights: 2^-9
    for name, a, b in (
        ("loss", ours, loss),
        ("d query", d_query, q.grad),
        ("d temperature", d_temperature, t.grad),
    ):
        scale = float(b.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= rtol * scale, name


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    rows, keys = features(20, 64, dtype), features(5000, 64, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(_native.native_online_softmax(rows, None, torch.tensor(0.1), [keys]))
    finally:
        torch.set_num_threads(before)
    for lse, mean in results[1:]:
        assert torch.equal(lse, results[0][0])
        if dtype == torch.bfloat16:  # torch's fp32 product may round by the number of threads
            assert torch.equal(mean, results[0][1])
        torch.testing.assert_close(mean, results[0][1])


@needs_library
def test_calls_from_several_python_threads() -> None:
    rows, keys = features(20, 64, torch.bfloat16), features(3000, 64, torch.bfloat16)
    expected = _native.native_online_softmax(rows, None, torch.tensor(0.1), [keys])
    found: list[tuple[Tensor, Tensor]] = []

    def work() -> None:
        found.append(_native.native_online_softmax(rows, None, torch.tensor(0.1), [keys]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for lse, mean in found:
        assert torch.equal(lse, expected[0])
        assert torch.equal(mean, expected[1])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_useless_temperature_shows(bad: float, dtype: torch.dtype) -> None:
    rows, keys = features(3, 32, dtype), features(70, 32, dtype)
    lse, mean = _native.native_online_softmax(rows, None, torch.tensor(bad), [keys])
    if bad == float("inf"):  # all scores are 0: uniform weights
        torch.testing.assert_close(mean, keys.float().mean(0).expand(3, -1), rtol=0, atol=1e-3)
    else:
        assert not torch.isfinite(lse).any()
        assert not torch.isfinite(mean).any()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    rows, keys = features(40, 32, dtype), features(300, 32, dtype)
    rows[7, 3] = float("nan")
    lse, mean = _native.native_online_softmax(rows, None, torch.tensor(0.1), [keys])
    bad = torch.zeros(40, dtype=torch.bool)
    bad[7] = True
    assert torch.equal(lse.isnan(), bad)
    assert torch.equal(mean.isnan().any(1), bad)


@needs_library
def test_bad_input() -> None:
    temperature = torch.tensor(0.1)
    with pytest.raises(ShapeError, match="no keys"):
        _native.native_online_softmax(torch.randn(2, 4), None, temperature, [torch.empty(0, 4)])
    with pytest.raises(BackendError, match="float64"):
        _native.native_online_softmax(
            torch.randn(2, 4).double(), None, temperature, [torch.randn(3, 4)]
        )
    op = torch.ops.blipfast_native.softmax_mean
    with pytest.raises(RuntimeError, match="width"):
        op(torch.randn(2, 4), torch.randn(3, 5), temperature, True, True)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(torch.randn(4, 2).T, torch.randn(3, 4), temperature, True, True)
    with pytest.raises(RuntimeError, match="temperature"):
        op(torch.randn(2, 4), torch.randn(3, 4), temperature.double(), True, True)
    lse, mean = op(torch.randn(0, 4), torch.randn(3, 4), temperature, True, True)
    assert (tuple(lse.shape), tuple(mean.shape)) == ((0,), (0, 4))


@needs_library
def test_opcheck() -> None:
    arguments = (features(3, 32, torch.bfloat16), features(9, 32, torch.bfloat16))
    torch.library.opcheck(
        torch.ops.blipfast_native.softmax_mean.default,
        (*arguments, torch.tensor(0.1), True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_loader_says_why() -> None:
    code = "from blipfast.ops import _native; print(_native.status())"
    off = {"BLIPFAST_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **off},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "no native CPU operators: switched off by BLIPFAST_NATIVE=0"


def test_a_missing_or_broken_library_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = _native._load.__wrapped__
    library = tmp_path / "libblipfast_native.so"
    monkeypatch.setattr(_native, "LIBRARY", library)
    monkeypatch.delenv(_native.ENV_VAR, raising=False)
    assert "were not built" in load()
    library.write_bytes(b"not a library")
    assert "does not load" in load()


@needs_library
def test_only_cpu_tensors_of_known_dtypes() -> None:
    assert _native.why_not(torch.empty(1)) is None
    assert "on meta" in str(_native.why_not(torch.empty(1, device="meta")))
    assert "float16" in str(_native.why_not(torch.empty(1, dtype=torch.float16)))


@needs_library
@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", RAGGED)
def test_varlen_attention(
    lengths: list[int], causal: bool, dtype: torch.dtype, head_dim: int
) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    qkv = (3 * torch.randn(packing.total, 3, 2, head_dim)).to(dtype)
    ours = varlen_attention(qkv, packing, causal=causal, impl="native")
    plain = varlen_attention_reference(qkv, packing, causal)
    exact = varlen_attention_reference(qkv.double(), packing, causal)
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    allowed = 2 * (plain.double() - exact).abs().max() + 8 * eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@needs_library
def test_varlen_attention_keeps_nan_to_its_text() -> None:
    packing = Packing.from_lengths([3, 5, 2])
    qkv = torch.randn(10, 3, 2, 8)
    qkv[4] = float("nan")
    out = varlen_attention(qkv, packing, impl="native")
    assert out[3:8].isnan().any()
    assert not out[:3].isnan().any()
    assert not out[8:].isnan().any()


@needs_library
def test_varlen_attention_refuses_gradients_and_bad_offsets() -> None:
    packing = Packing.from_lengths([3])
    with pytest.raises(BackendError, match="no backward"):
        varlen_attention(torch.randn(3, 3, 2, 8, requires_grad=True), packing, impl="native")
    with pytest.raises(RuntimeError, match="must rise from 0 to the 3 tokens"):
        torch.ops.blipfast_native.varlen_attention(
            torch.randn(3, 3, 2, 8), torch.tensor([0, 4], dtype=torch.int32), False
        )


def test_a_graph_is_whole_when_the_library_is_not_loaded_yet() -> None:
    """The first thing that a program does may be to compile."""
    program = """
import torch
from blipfast.ops import contrastive_softmax
step = lambda q, k, t: contrastive_softmax(q, k, t).mean()
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
loss = compiled(q, k, torch.tensor(0.07))
loss.backward()
torch.testing.assert_close(loss, step(q, k, torch.tensor(0.07)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not _native.avx512(), reason="needs the C++ operators and AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (16, 16), (33, 31), (17, 100), (300, 257), (0, 4)]
)
def test_transposed_with_the_sums_of_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    transposed, sums = torch.ops.blipfast_native.transpose_and_sum(x)
    assert torch.equal(transposed, x.t())
    assert transposed.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    exact = x.double().sum(0)
    torch.testing.assert_close(sums.double(), exact, atol=tolerance, rtol=tolerance)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.blipfast_native.transpose_and_sum(torch.zeros(3, 4, dtype=dtype).t())
