# SPDX-License-Identifier: Apache-2.0
"""Tiles of rows in Triton, each a head of a query from a [B, H, N, D] tensor, and arithmetic on them.

A tile is a tuple of pieces [ROWS, channels] whose sizes are powers of two, as Triton wants them: head_dim 40
is 32 + 8. Padded to 64 it would cost twice the products.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import tiles as _tiles


class View(NamedTuple):
    """A tensor whose last dimension is contiguous; strides in elements, 0 is legal."""

    data: Any
    batch: Any
    head: Any
    row: Any


split = triton.constexpr_function(_tiles.split)


@triton.constexpr_function
def pieces(size):
    return len(split(size))


@triton.constexpr_function
def width(size, i):
    return split(size)[i]


@triton.constexpr_function
def offset(size, i):
    return sum(split(size)[:i])


@triton.jit
def inner(x, y):
    """<x, y> of each row."""
    last: tl.constexpr = len(x) - 1  # from 96 columns on the widest, maybe of several
    products = x[last] * y[last]
    total = tl.zeros([products.shape[0]], tl.float32)
    for i in tl.static_range(last):
        if x[i].shape[1] == products.shape[1]:
            products += x[i] * y[i]  # one sum across the threads, not one each
        else:
            total += tl.sum(x[i] * y[i], 1)
    return total + tl.sum(products, 1)


@triton.jit
def scaled(x, factor):
    """factor[row] x"""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (factor[:, None] * x[i],)
    return out


@triton.jit
def sum_of(a, x, b, y):
    """a[row] x + b[row] y"""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (a[:, None] * x[i] + b[:, None] * y[i],)
    return out


@triton.jit
def chosen(first, x, y):
    """x in the rows of `first`, else y."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.where(first[:, None], x[i], y[i]),)
    return out


@triton.jit
def over_tile(x, HEADS: tl.constexpr):
    """x [ROWS] summed over the heads of each query, of which the tile has HEADS, in the place of each."""
    if HEADS == 1:
        return x
    else:
        by_query = tl.reshape(x, (x.shape[0] // HEADS, HEADS))
        total = tl.sum(by_query, 1, keep_dims=True)
        return tl.reshape(tl.broadcast_to(total, by_query.shape), x.shape)


@triton.jit
def rows_at(view, b, h, first, row, ALIGNED: tl.constexpr):
    """Pointers to rows first + row."""
    head = tl.cast(b, tl.int64) * view.batch + tl.cast(h, tl.int64) * view.head
    return view.data + (head + (first + row).to(tl.int64) * view.row) * ALIGNED


@triton.jit
def load_rows(view, b, h, first, row, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
              ALIGNED: tl.constexpr):  # fmt: skip
    """Rows first + row of a [B, H, N, D] tensor in pieces, 0 where `keep` is false and in the padding."""
    out = ()
    at = rows_at(view, b, h, first, row, ALIGNED)
    for i in tl.static_range(pieces(PADDED)):
        channel = offset(PADDED, i) + tl.arange(0, width(PADDED, i))
        mask = keep[:, None]
        if offset(PADDED, i) + width(PADDED, i) > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM)[None, :]
        out = out + (tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0),)
    return out


@triton.jit
def load_vector(vectors, c, at, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """Vectors of concept c from [C, H, D] for the heads of a tile, in pieces: [1, channels] if that is one,
    else [ROWS, channels]."""
    out = ()
    start = vectors + (c.to(tl.int64) * at.heads + at.h) * HEAD_DIM
    for i in tl.static_range(pieces(FEATURES)):
        channel = offset(FEATURES, i) + tl.arange(0, width(FEATURES, i))
        mask = channel < HEAD_DIM
        if len(start.shape) == 0:
            x = tl.load(start + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
        else:
            mask = at.inside[:, None] & mask[None, :]
            x = tl.load(start[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        out = out + (x,)
    return out


@triton.jit
def write(out, o, at, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr, ALIGNED: tl.constexpr):
    to = rows_at(out, at.b, at.h, at.first, at.row, ALIGNED)
    for i in tl.static_range(len(o)):
        channel = offset(FEATURES, i) + tl.arange(0, width(FEATURES, i))
        mask = at.inside[:, None] & (channel < HEAD_DIM)[None, :]
        tl.store(to[:, None] + channel[None, :], o[i].to(out.data.dtype.element_ty), mask=mask)
