"""Hadamard matrices, and fast products with them.

A Hadamard matrix H of order n has entries +-1 and orthogonal rows: H Hᵀ = n I, so H/√n is a rotation. Here
H_n = H_k ⊗ H_2ᵖ, the core H_k outermost: entry (a 2ᵖ + b, c 2ᵖ + d) is H_k[a, c] H_2ᵖ[b, d]. H_2ᵖ is Sylvester's,
which is symmetric. The core is 1 or one of Paley's (1933), built from the squares of the field of q elements, q a power
of an odd prime:

- Paley I, order q + 1 for q = 3 mod 4. It is *not* symmetric, and neither is any H_n with such a core.
- Paley II, order 2 (q + 1) for q = 1 mod 4, which is symmetric. It is used where Paley I does not reach.

Orders that need other constructions (92, 116, 428, ...) are not built; `largest_block` gives the block to use instead.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

from dlqc import fwht
from dlqc.errors import ContractError

# A core is multiplied as a dense matrix: beyond this one it costs more than the rest of the transform by far.
_LARGEST_CORE = 4096

# Measured in float64 on [12288, 4096] with n = 4096, one thread of an EPYC (Zen 4, MKL), median of 3: products with
# three Kronecker factors of 16 in tiles of 2^18 entries 0.48 s, four of 8 0.50 s, two of 64 0.71 s; butterflies of adds
# and subtractions 0.51 s, behind a product with 16 0.45 s. Products alone are as fast within the noise, and simpler.
# Of tiles of 2^14 to 2^20 entries, 2^18 is best or nearly so.
_RADIX_BITS = 4
_TILE = 2**18
_TILE_ACCELERATOR = 2**24

# Columns of a row-major matrix are fetched this many at a time at least: 128 bytes of float32, two cache lines.
_COLUMNS = 32


def order(n: int) -> tuple[int, int] | None:
    """The split n = k 2ᵖ with the smallest core k that can be built, as (k, p), or None if there is none.

    None does not mean that no Hadamard matrix of order n exists: this module just cannot build it.

    >>> order(4096), order(12288), order(18944), order(11008)
    ((1, 12), (12, 10), (148, 7), (344, 5))
    >>> order(92), order(12 * 1024 + 1)
    (None, None)
    """
    if n < 1:
        return None
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    if odd == 1:
        return 1, twos
    for bits in range(2, twos + 1):
        core = odd << bits
        if core <= _LARGEST_CORE and _paley_field(core) is not None:
            return core, twos - bits
    return None


def largest_block(n: int) -> int:
    """The largest divisor of n that is the order of a Hadamard matrix built here: n itself where that is possible.

    >>> largest_block(12288), largest_block(13696), largest_block(92), largest_block(35)
    (12288, 128, 4, 1)

    Raises:
        ContractError: n is not positive.
    """
    if n < 1:
        raise ContractError(f"{n} has no blocks", where="n", remedy="Give a positive size")
    small = [divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0]
    divisors = dict.fromkeys([*(n // divisor for divisor in small), *reversed(small)])  # from the largest down
    return next(block for block in divisors if order(block) is not None)


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The dense matrix H_n [n, n] of +-1, H Hᵀ = n I, in any signed dtype. Not symmetric if its core is Paley I.

    >>> hadamard(4, torch.int8).tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]

    Raises:
        ContractError: no matrix of order n can be built here.
    """
    core, twos = _split(n)
    return torch.kron(_core(core), _sylvester(twos)).to(dtype)


def multiply(x: torch.Tensor, n: int, transpose: bool = False) -> torch.Tensor:
    """x H/√n for every block of n consecutive entries of the last dimension; x Hᵀ/√n with `transpose`, its inverse.

    No n x n matrix is built. Beside the output, two tiles of about 2^18 entries are allocated. Products obey torch's
    global float32 matmul precision, which is full unless somebody lowered it.

    Args:
        x: [..., d], d a multiple of n; any strides. bfloat16 and float16 are computed in float32 and rounded at the end.
        n: an order that `order` can split.

    Returns:
        A new contiguous tensor of the shape and dtype of x, without gradient.

    Raises:
        ContractError: the order cannot be built, d is not a multiple of n, or x is not floating.

    >>> multiply(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]), 4).tolist()
    [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, -1.0, -1.0]
    """
    _check(x, n, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _transform(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), n, 0, transpose)
    return out


def multiply_rows(w: torch.Tensor, n: int, transpose: bool = False) -> torch.Tensor:
    """What `multiply` does to rows, for columns: Hᵀ/√n w for every block of n rows; H/√n w with `transpose`.

    It equals `multiply(w.T, n, transpose).T`, but w is never transposed as a whole.

    Args:
        w: [N, K], N a multiple of n; strides and dtypes as in `multiply`.
        n: an order that `order` can split.

    Returns:
        A new contiguous matrix of the shape and dtype of w, without gradient.

    Raises:
        ContractError: as `multiply`, or w is not a matrix.

    >>> multiply_rows(torch.tensor([[3.0], [1.0], [0.0], [0.0]]), 4).T.tolist()
    [[2.0, 1.0, 2.0, 1.0]]
    """
    if w.dim() != 2:
        raise ContractError(f"{w.dim()} dimensions", where="w", remedy="Give a matrix [N, K], or use multiply")
    _check(w, n, 0)
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if w.numel():
        _transform(w, out, n, 1, transpose)
    return out


def signs(n: int, seed: int) -> torch.Tensor:
    """A random vector [n] of +-1 in float64, the same for the same seed; torch's global generator is not touched.

    >>> torch.equal(signs(1000, 3), signs(1000, 3)), torch.equal(signs(1000, 3), signs(1000, 4))
    (True, False)
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1


def side(n: int, transpose: bool = False) -> fwht.Side:
    """H/√n, or its transpose, as `dlqc.fwht` takes it."""
    k, _ = _split(n)
    return fwht.Side(n, (_core(k).T if transpose else _core(k)) if k > 1 else None)


def _native(x: torch.Tensor, out: torch.Tensor, n: int, dim: int, transpose: bool) -> bool:
    """`_transform` in native code, or False where there is none for these tensors."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = side(n, transpose)
    sides = {"row" if dim == 0 else "column": half}
    if x.stride(1) == 1 or x.shape[1] == 1 or x.device.type != "cpu":
        return fwht.run(x, out, wide, **sides)
    # Any other strides: tiles are copied, so that a number does not depend on how its matrix lies in memory.
    step = max(_TILE // x.shape[1 - dim], 1 if dim == 0 else _COLUMNS)
    tiles = zip(torch.split(x, step, dim), torch.split(out, step, dim), strict=True)
    return all(fwht.run(source.contiguous(), target, wide, **sides) for source, target in tiles)


@torch.no_grad()
def _transform(x: torch.Tensor, out: torch.Tensor, n: int, dim: int, transpose: bool) -> None:
    """Write the transform of x [R, C] to out [R, C], tile by tile along `dim`; blocks run along the other dimension."""
    if _native(x.detach(), out, n, dim, transpose):
        return
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = [h.to(x.device, dtype) for h in _factors(n)]
    if factors:
        factors[0] = factors[0] / math.sqrt(n)  # once and here: the other factors stay exact
    if transpose:
        factors = [h.T for h in factors]
    length = x.shape[1 - dim]
    tile = _TILE if x.device.type == "cpu" else _TILE_ACCELERATOR
    step = min(x.shape[dim], max(tile // length, 1 if dim == 0 else _COLUMNS))
    buffers = torch.empty(2, step * length, dtype=dtype, device=x.device)
    for start in range(0, x.shape[dim], step):
        source, target = (t.narrow(dim, start, min(step, x.shape[dim] - start)) for t in (x, out))
        now, free = buffers[0, : source.numel()], buffers[1, : source.numel()]
        now.view(source.shape).copy_(source)
        inner = 1 if dim == 0 else source.shape[1]  # entries between two neighbours of the factor at hand
        for h in reversed(factors):
            size = len(h)
            if inner == 1:
                torch.mm(now.view(-1, size), h, out=free.view(-1, size))
            else:
                v = now.view(-1, size, inner)
                torch.bmm(h.T.expand(len(v), size, size), v, out=free.view(v.shape))
            inner *= size
            now, free = free, now
        target.copy_(now.view(target.shape))


def _factors(n: int) -> list[torch.Tensor]:
    """Small matrices of +-1 whose Kronecker product, in this order, is H_n: the core, then near-equal powers of two."""
    core, twos = _split(n)
    count = -(-twos // _RADIX_BITS)
    powers = [_sylvester(twos // count + (i < twos % count)) for i in range(count)]
    return [_core(core), *powers] if core > 1 else powers


def _split(n: int) -> tuple[int, int]:
    """`order(n)`, or an error that names the nearest orders there are."""
    split = order(n)
    if split is None:
        below = next((m for m in range(n - 1, 0, -1) if order(m)), None)
        above = next(m for m in itertools.count(max(n + 1, 1)) if order(m))
        near = f"{below} and {above}" if below else f"{above}"
        blocks = f"; blocks of {largest_block(n)} divide {n}" if n > 0 else ""
        raise ContractError(
            f"no Hadamard matrix of order {n} can be built here", where="n", remedy=f"The nearest: {near}{blocks}"
        )
    return split


def _check(x: torch.Tensor, n: int, dim: int) -> None:
    """Raise unless x has one of the four dtypes and whole blocks of n along `dim`."""
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ContractError(f"cannot rotate {x.dtype}", where="dtype", remedy="Convert to float32 or float64 first")
    _split(n)
    if x.dim() == 0 or x.shape[dim] % n:
        raise ContractError(
            f"dimension {dim} of the shape {list(x.shape)} does not divide into blocks of {n}",
            where="n",
            remedy=f"Use a divisor, for example {largest_block(x.shape[dim])}"
            if x.dim()
            else "Give at least one dimension",
        )


@functools.cache
def _sylvester(p: int) -> torch.Tensor:
    """H_2ᵖ [2ᵖ, 2ᵖ] in int8: entry (i, j) is -1 to the number of bits that i and j share."""
    h = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(p):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@functools.cache
def _core(k: int) -> torch.Tensor:
    """H_k [k, k] in int8, for k = 1 or an order that `_paley_field` knows."""
    field = _paley_field(k)
    if field is None:
        return torch.ones(1, 1, dtype=torch.int8)
    residues = _jacobsthal(*field)
    q = len(residues)
    sign = -1 if q % 4 == 3 else 1  # of -1 in the field: the residues are skew for 3 mod 4, symmetric for 1 mod 4
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)  # C Cᵀ = q I, zero diagonal
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, sign, residues
    eye = torch.eye(q + 1, dtype=torch.int8)
    if sign == -1:
        return conference + eye
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    turned = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, pair) + torch.kron(eye, turned)


def _jacobsthal(p: int, m: int) -> torch.Tensor:
    """Q [q, q] in int8 for q = pᵐ: entry (a, b) is 1 where a - b is a square of the field, -1 where not, 0 for a = b."""
    places = torch.tensor([p**i for i in range(m)])
    digits = torch.arange(p**m)[:, None] // places % p
    character = torch.full((p**m,), -1, dtype=torch.int8)
    character[0] = 0
    character[(torch.tensor(_squares(p, m)) * places).sum(1)] = 1
    difference = sum((digits[:, None, i] - digits[None, :, i]) % p * p**i for i in range(m))
    return character[difference]


def _squares(p: int, m: int) -> list[tuple[int, ...]]:
    """The nonzero squares of the field of pᵐ elements, as coefficients of polynomials over the integers mod p.

    If the powers of x modulo a polynomial of degree m run through all pᵐ - 1 nonzero residues, every one of them has an
    inverse: the residues are the field, x generates it, and its squares are the even powers of x.
    """
    one = (1,) + (0,) * (m - 1)
    for tail in itertools.product(range(p), repeat=m):  # xᵐ = tail[0] + tail[1] x + ...
        powers = [one]
        while len(powers) < p**m:
            *low, top = powers[-1]
            element = tuple((a + top * b) % p for a, b in zip((0, *low), tail, strict=True))
            if element == one:
                break
            powers.append(element)
        if len(powers) == p**m - 1:
            return powers[::2]
    raise AssertionError(f"{p} is not prime")


@functools.cache
def _paley_field(k: int) -> tuple[int, int] | None:
    """The field (p, m) from which a Paley matrix of order k is built: Paley I if it exists, or else Paley II."""
    if k % 4:
        return None
    if (first := _prime_power(k - 1)) is not None:
        return first  # k - 1 is 3 mod 4 since k divides by 4
    return _prime_power(k // 2 - 1) if (k // 2 - 1) % 4 == 1 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = pᵐ and p prime, or None."""
    if q < 2:
        return None
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None
