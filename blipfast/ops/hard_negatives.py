"""Hard-negative sampling for image-text matching (BLIP section 3.2, after ALBEF section 3.3).

For every query one key (or several) is drawn with probability in proportion to

    w_ij = softmax_j(q_i . k_j / T) + eps     and 0 where the pair (i, j) is excluded.

The softmax runs over all `M` keys, the excluded ones too. The draw is the Gumbel-max trick on
`log w`, which needs no normalisation and no cumulative sum:

    argmax_j  log w_ij - log(-log(u_ij))

`u_ij` comes from Philox4x32-10, a counter-based generator, so it depends on nothing but (seed,
step, stream, global row, global column), not on device, tile size, or the number of ranks:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (column div 4, row, step, stream);  word = output[column mod 4]
    u       = (word div 512 + 0.5) / 2^23         exact in float32, strictly between 0 and 1

Shapes: `B` queries, `M` keys, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops import _native, _triton
from blipfast.ops._dispatch import Backends

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SCORES = 1 << 20  # scores held at a time

backends = Backends("sample_hard_negatives")


def sample_hard_negatives(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    *,
    eps: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    offset: int = 0,
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int = 0,
    first_row: int | None = None,
    first_column: int = 0,
    num: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Draw `num` different keys for each query, by the weights that the module's head states.

    Args:
        query: `(B, D)` float.
        keys: `(M, D)` float.
        temperature: one element. Zero or NaN makes all weights NaN: every draw is then -1.
        eps: added to the softmax (1e-4 in BLIP's pre-training, 0 in fine-tuning). With 0 the draw
            works on log-probabilities, so keys whose probability underflows can still be drawn.
        query_ids, key_ids: `(B,)` and `(M,)` integers: pairs with equal ids are excluded. Without
            them the pairs `(i, offset + i)` are.
        offset: column of the key that belongs to query 0 (own rank's start among all ranks' keys).
        seed, step, stream: name the random numbers. Draws in different directions of one step
            (image for text, text for image) must differ in `stream`, or they are correlated. A step
            may be an int64 scalar on the device, which is never waited for (nor checked).
        first_row: global number of query 0; `offset` when None.
        first_column: global number of key 0. A rank that draws among its own pairs only passes
            `first_row = first_column = rank * B`, with `offset = 0`.
        num: how many to draw for each row, without replacement.
        impl: backend name or "auto".

    Returns:
        int64 `(B,)`, or `(B, num)` when `num > 1`, in order of drawing. -1 where nothing is left to
        draw (a batch of one, all ids equal, `num` above the number of keys): nothing raises and the
        host never waits for the device.

    Raises:
        ShapeError: widths, ids or devices do not fit, or a number is out of range.
        BackendError: `impl` names a backend that cannot run.
    """
    _check(query, keys, temperature, query_ids, key_ids)
    first_row = offset if first_row is None else first_row
    counter = step.reshape(()) if isinstance(step, Tensor) else None
    step = 0 if isinstance(step, Tensor) else step
    numbers = {"step": step, "stream": stream, "first_row": first_row, "first_column": first_column}
    for name, value in numbers.items():
        if not 0 <= value <= _WORD:
            raise ShapeError(f"sample_hard_negatives: {name}={value} must be in 0 ... 2^32 - 1")
    if num < 1 or not 0 <= seed < 1 << 63 or eps < 0:
        raise ShapeError(
            f"sample_hard_negatives: needs num >= 1, 0 <= seed < 2^63 and eps >= 0; got "
            f"num={num}, seed={seed}, eps={eps}"
        )
    run = backends(query, impl)
    drawn: Tensor = run(
        query.detach(),
        keys.detach(),
        temperature.detach().reshape(()),
        query_ids,
        key_ids,
        eps,
        offset,
        seed,
        step,
        stream,
        first_row,
        first_column,
        num,
        counter,
    )
    return drawn[:, 0] if num == 1 else drawn


def hard_negative_weights(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    *,
    eps: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The weights `w` `(B, M)` that `sample_hard_negatives` draws by (arguments as there)."""
    _check(query, keys, temperature, query_ids, key_ids)
    with torch.no_grad():
        dtype = torch.promote_types(query.dtype, torch.float32)
        weights = torch.softmax(query.to(dtype) @ keys.to(dtype).T / temperature, dim=1) + eps
        columns = torch.arange(len(keys), device=query.device)
        excluded = _excluded(columns, len(query), query_ids, key_ids, offset)
        return weights.masked_fill_(excluded, 0.0)


# Backends take all arguments in `sample_hard_negatives`' order; the counter, where there is one,
# stands for the step.
def _triton_backend(*arguments: Any) -> Tensor:
    from blipfast.kernels.hard_negatives import sample_op

    drawn: Tensor = sample_op(*arguments)
    return drawn


def _by_blocks(engine: str) -> Callable[..., Tensor]:
    """The backend whose scores are PyTorch's, by blocks of rows, and drawn from by `engine`."""

    def run(*arguments: Any) -> Tensor:
        drawn: Tensor = torch.ops.blipfast.sample_hard_negatives(*arguments, engine)
        return drawn

    return run


backends.register("triton", _triton.why_not)(_triton_backend)
backends.register("native", _native.why_not)(_by_blocks("native"))
backends.register("torch")(_by_blocks("torch"))


@backends.register("reference")
def sample_hard_negatives_reference(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    eps: float,
    offset: int,
    seed: int,
    step: int,
    stream: int,
    first_row: int,
    first_column: int,
    num: int,
    counter: Tensor | None,
) -> Tensor:
    """The draw `(B, num)` from the whole weight matrix, as the module's head states it."""
    weights = hard_negative_weights(
        query, keys, temperature, eps=eps, query_ids=query_ids, key_ids=key_ids, offset=offset
    )
    rows = torch.arange(len(query), device=query.device) + first_row
    columns = torch.arange(len(keys), device=query.device) + first_column
    number = step if counter is None else counter
    u = uniform(rows, columns, seed=seed, step=number, stream=stream)
    return _best(weights.log() - (-u.log()).log(), num)


backends.register("triton_interpreter", _triton.why_not_interpreter)(_triton_backend)


@torch.library.custom_op(
    "blipfast::sample_hard_negatives",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor temperature, Tensor? query_ids, Tensor? key_ids,"
    " float eps, int offset, int seed, int step, int stream, int first_row, int first_column,"
    " int num, Tensor? counter=None, str engine='torch') -> Tensor",
)
def _sample(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    eps: float,
    offset: int,
    seed: int,
    step: int,
    stream: int,
    first_row: int,
    first_column: int,
    num: int,
    counter: Tensor | None = None,
    engine: str = "torch",
) -> Tensor:
    """As the reference, but in log space and by blocks of rows, which bounds the memory.

    engine: what draws from a block's scores, "torch" or "native" (one pass of C++ over them).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    draw = torch.ops.blipfast_native.draw_negatives if engine == "native" else _draw
    number: int | Tensor = step
    if counter is not None:
        number = int(counter) if engine == "native" else counter
    if query_ids is not None and key_ids is not None:
        query_ids, key_ids = query_ids.long().contiguous(), key_ids.long().contiguous()
    block = max(1, _SCORES // max(1, len(keys)))
    drawn = torch.empty((len(query), num), dtype=torch.int64, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        keys_t = keys.to(dtype).T
        for start in range(0, len(query), block):
            rows = slice(start, min(start + block, len(query)))
            scores = query[rows].to(dtype) @ keys_t / temperature.to(dtype)
            ids = None if query_ids is None else query_ids[rows]
            counters = (seed, number, stream, first_row + start, first_column, num)
            drawn[rows] = draw(scores, ids, key_ids, eps, offset + start, *counters)
    return drawn


@_sample.register_fake
def _(query, keys, temperature, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    return query.new_empty((query.shape[0], options[7]), dtype=torch.int64)


def _draw(
    scores: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    eps: float,
    offset: int,
    seed: int,
    step: int | Tensor,
    stream: int,
    first_row: int,
    first_column: int,
    num: int,
) -> Tensor:
    """Draws `(R, num)` from a block's scores `(R, M)`, which are written over."""
    count, columns = len(scores), torch.arange(scores.shape[1], device=scores.device)
    scores -= scores.logsumexp(1, keepdim=True)
    if eps > 0:
        scores.exp_().add_(eps).log_()
    excluded = _excluded(columns, count, query_ids, key_ids, offset)
    scores.masked_fill_(excluded, float("-inf"))
    rows = torch.arange(count, device=scores.device) + first_row
    u = uniform(rows, columns + first_column, seed=seed, step=step, stream=stream)
    scores -= u.log_().neg_().log_()
    return _best(scores, num)


def uniform(rows: Tensor, columns: Tensor, *, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """The numbers `u` `(R, C)` in float32 for global rows `(R,)` and consecutive columns `(C,)`."""
    if columns.numel() == 0:
        return torch.empty(len(rows), 0, device=rows.device)
    skip = columns[:1] % 4
    groups = torch.arange((len(columns) + 6) // 4, device=columns.device) + columns[:1] // 4
    words = philox(groups[None, :], rows[:, None], step, stream, seed=seed)
    flat = torch.stack(words, dim=-1).flatten(1)
    picked = flat.index_select(1, torch.arange(len(columns), device=columns.device) + skip)
    return (picked >> 9).float().add_(0.5).mul_(2.0**-23)


def philox(
    c0: Tensor, c1: Tensor, c2: int | Tensor, c3: int, *, seed: int, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011): four 32-bit words, held in int64, for each counter.

    `c0` and `c1` broadcast against each other. Products wrap in int64 like unsigned ones, which
    leaves both halves right after masking.
    """
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    c0, c1 = torch.broadcast_tensors(c0.long(), c1.long())
    words = (c0, c1, torch.zeros_like(c0) + c2, torch.full_like(c0, c3))
    for _ in range(rounds):
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = (
            (second >> 32 & _WORD) ^ words[1] ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ words[3] ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return words


def _best(scores: Tensor, num: int) -> Tensor:
    """Columns of the `num` best scores `(R, num)`, -1 where a score is no real candidate."""
    drawn = torch.full((len(scores), num), -1, dtype=torch.int64, device=scores.device)
    available = min(num, scores.shape[1])
    if available == 0:
        return drawn
    values, indices = scores.topk(available, dim=1)
    drawn[:, :available] = torch.where(values.isfinite(), indices, -1)
    return drawn


def _excluded(
    columns: Tensor, count: int, query_ids: Tensor | None, key_ids: Tensor | None, offset: int
) -> Tensor:
    """Which pairs `(count, M)` may not be drawn."""
    if query_ids is not None and key_ids is not None:
        return query_ids[:, None] == key_ids[None, :]
    own = torch.arange(offset, count + offset, device=columns.device)
    return own[:, None] == columns[None, :]


def _check(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
) -> None:
    name = "sample_hard_negatives"
    for label, tensor in (("query", query), ("keys", keys)):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ShapeError(
                f"{name}: {label} must be a float matrix, not {tensor.dtype} {tuple(tensor.shape)}"
            )
    if query.shape[1] != keys.shape[1] or query.device != keys.device:
        raise ShapeError(
            f"{name}: query is {tuple(query.shape)} on {query.device}, keys {tuple(keys.shape)} on "
            f"{keys.device}; width and device must agree"
        )
    if temperature.numel() != 1:
        raise ShapeError(f"{name}: temperature must have one element, not {temperature.numel()}")
    if (query_ids is None) != (key_ids is None):
        raise ShapeError(f"{name}: give both query_ids and key_ids, or neither")
    for ids, rows in ((query_ids, query), (key_ids, keys)):
        if ids is not None and ids.shape != rows.shape[:1]:
            raise ShapeError(f"{name}: {tuple(ids.shape)} ids for {len(rows)} rows of features")
