# mypy: ignore-errors
# ruff: noqa: RUF005 - tuples grow by addition, for Triton does not unpack them
"""The Triton kernels behind `triton_scan`, which is the only one to import this: importing it imports Triton.

The tokens are cut into chunks of ROWS x GROUPS. A program has one chunk of one sample and WIDTH channels, as ROWS tiles
(GROUPS, WIDTH): tile r holds the r-th token of every group. With a warp per group, and a lane per channel, each thread has
ROWS consecutive tokens of one channel in its registers, and a sum over earlier or later tokens is a recurrence of
multiply-adds there. Only the sums of whole groups pass between threads.

Inside a chunk `|w|` adds up to at most 25, so that one shift of all exponents is safe there. Between chunks, a sum is
`exp(exponent) * (a, b)`, and the exponent is the shift of the chunk that dominates it less `w` times the distance to that,
worked out anew each time: so it is rounded once, however many chunks there are.

(a, b) is (sum of weights times values, sum of weights) in the forward pass, and (sum of g' y, sum of g') in the backward
pass, with g' = gy / denominator. "From the left" is what the tokens before contribute, "from the right" what those behind
do; the token itself is in neither.

Buffers, float32: sums (B, 5, chunks, C): a chunk's shift, a and b as seen from just behind it, a and b as seen from just
before it; carries (B, 6, chunks, C): exponent, a, b of all the chunks to the left, the same to the right; top (B, C): the
largest key, from which exponents count; shares_w, shares_u (B, chunks, C): each chunk's share in the gradients of -w and u.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)
"""Exponent of an empty sum. Finite, so that differences are."""


@triton.jit
def chunk_sums(
    key, value, decay, sums, tokens, channels, chunks, key_batch, key_token, value_batch, value_token,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum up every chunk of keys and values, as seen from just behind it and from just before it."""
    batch, chunk, channel, within = _place(channels, chunks, WIDTH)
    w = _bounded(decay, channel, LIMIT) / tokens
    k = _load(key, batch, chunk, channel, tokens, key_batch, key_token, ROWS, GROUPS, float("-inf"))
    v = _load(value, batch, chunk, channel, tokens, value_batch, value_token, ROWS, GROUPS, 0.0)
    shift = _largest(k, ROWS)
    a, b = _weighted(k, v, shift, ROWS)
    _store_sums(sums, batch, chunk, chunks, channel, channels, within, w, shift, a, b, ROWS, GROUPS)


@triton.jit
def carry(
    sums, carries, decay, top, tokens, channels, chunks,
    FROM_TOP: tl.constexpr, LIMIT: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks, in one direction per program, and leave at each what has come before it.

    With FROM_TOP, exponents count from the largest shift, which is stored in `top`; else they stay what they are.
    """
    blocks = tl.cdiv(channels, WIDTH)
    program = tl.program_id(0)
    channel = program % blocks * WIDTH + tl.arange(0, WIDTH)
    within = channel < channels
    channel = tl.minimum(channel, channels - 1)
    leftwards = program // blocks % 2
    batch = (program // (2 * blocks)).to(tl.int64)
    per_chunk = _bounded(decay, channel, LIMIT) / tokens * LENGTH
    plane = chunks * channels
    shifts = sums + batch * 5 * plane + channel
    first = shifts + (1 + 2 * leftwards) * plane
    out = carries + (batch * 6 + 3 * leftwards) * plane + channel

    origin = tl.zeros([WIDTH], tl.float32)
    if FROM_TOP:
        origin += NOTHING
        for start in range(0, chunks, 16):
            row = start + tl.arange(0, 16)[:, None]
            origin = tl.maximum(origin, tl.max(tl.load(shifts + row * channels, row < chunks, NOTHING), 0))
        if leftwards == 0:
            tl.store(top + batch * channels + channel, origin, within)

    base = tl.full([WIDTH], NOTHING, tl.float32)
    distance = tl.zeros([WIDTH], tl.float32)
    a = tl.zeros([WIDTH], tl.float32)
    b = tl.zeros([WIDTH], tl.float32)
    step = (1 - 2 * leftwards) * channels
    here = leftwards * (chunks - 1) * channels
    next_shift, next_a, next_b = tl.load(shifts + here), tl.load(first + here), tl.load(first + here + plane)
    for walked in range(chunks):
        shift, added_a, added_b = next_shift - origin, next_a, next_b
        ahead = tl.where(walked + 1 < chunks, here + step, here)  # asked for before this chunk's are worked on
        next_shift, next_a, next_b = tl.load(shifts + ahead), tl.load(first + ahead), tl.load(first + ahead + plane)
        exponent = base - per_chunk * distance
        tl.store(out + here, exponent, within)
        tl.store(out + here + plane, a, within)
        tl.store(out + here + 2 * plane, b, within)
        # the chunk's own sum is seen from just behind it; what was carried still has to cross the chunk
        exponent -= per_chunk
        larger = tl.maximum(exponent, shift)
        kept, added = tl.exp(exponent - larger), tl.exp(shift - larger)
        a = a * kept + added_a * added
        b = b * kept + added_b * added
        distance = tl.where(shift > exponent, 0.0, distance + 1.0)
        base = tl.where(shift > exponent, shift, base)
        here = ahead


@triton.jit
def mix(
    key, value, decay, first, carries, top, out, tokens, channels, chunks,
    key_batch, key_token, value_batch, value_token,
    LIMIT: tl.constexpr, LIMIT_U: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The output of one chunk, from its own tokens and the sums carried to it."""
    batch, chunk, channel, within = _place(channels, chunks, WIDTH)
    w = _bounded(decay, channel, LIMIT) / tokens
    u = _bounded(first, channel, LIMIT_U * tokens) / tokens
    k = _load(key, batch, chunk, channel, tokens, key_batch, key_token, ROWS, GROUPS, float("-inf"))
    v = _load(value, batch, chunk, channel, tokens, value_batch, value_token, ROWS, GROUPS, 0.0)
    origin = tl.load(top + batch * channels + channel)
    y, _, _ = _outputs(k, v, w, u, origin, carries, batch, chunk, channel, channels, chunks, ROWS, GROUPS)
    _store(out, y, batch, chunk, channel, within, tokens, channels, ROWS, GROUPS)


@triton.jit
def gradient_sums(
    key, value, gradient, decay, first, carries, top, sums, tokens, channels, chunks,
    key_batch, key_token, value_batch, value_token, gradient_batch, gradient_token,
    LIMIT: tl.constexpr, LIMIT_U: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What `chunk_sums` is to values and keys, for g' y and g'."""
    batch, chunk, channel, within = _place(channels, chunks, WIDTH)
    w = _bounded(decay, channel, LIMIT) / tokens
    u = _bounded(first, channel, LIMIT_U * tokens) / tokens
    k = _load(key, batch, chunk, channel, tokens, key_batch, key_token, ROWS, GROUPS, float("-inf"))
    v = _load(value, batch, chunk, channel, tokens, value_batch, value_token, ROWS, GROUPS, 0.0)
    gy = _load(gradient, batch, chunk, channel, tokens, gradient_batch, gradient_token, ROWS, GROUPS, 0.0)
    origin = tl.load(top + batch * channels + channel)
    y, denominator, shift = _outputs(k, v, w, u, origin, carries, batch, chunk, channel, channels, chunks, ROWS, GROUPS)
    a = ()
    b = ()
    for r in tl.static_range(ROWS):
        g = gy[r] / denominator[r]
        a = a + (g * y[r],)
        b = b + (g,)
    _store_sums(sums, batch, chunk, chunks, channel, channels, within, w, -shift, a, b, ROWS, GROUPS)


@triton.jit
def gradients(
    key, value, gradient, decay, first, carries, top, gradient_carries, grad_key, grad_value, shares_w, shares_u,
    tokens, channels, chunks, key_batch, key_token, value_batch, value_token, gradient_batch, gradient_token,
    LIMIT: tl.constexpr, LIMIT_U: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's keys and values, and its share in those of w and u."""
    batch, chunk, channel, within = _place(channels, chunks, WIDTH)
    w = _bounded(decay, channel, LIMIT) / tokens
    u = _bounded(first, channel, LIMIT_U * tokens) / tokens
    k = _load(key, batch, chunk, channel, tokens, key_batch, key_token, ROWS, GROUPS, float("-inf"))
    v = _load(value, batch, chunk, channel, tokens, value_batch, value_token, ROWS, GROUPS, 0.0)
    gy = _load(gradient, batch, chunk, channel, tokens, gradient_batch, gradient_token, ROWS, GROUPS, 0.0)
    origin = tl.load(top + batch * channels + channel)

    # Sums from the left and from the right keep exponents of their own. With a negative decay the smaller of the two may
    # be beyond float32 here and still dominate far away.
    shift = _largest(k, ROWS)
    xa, xb = _weighted(k, v, shift, ROWS)
    shift = tl.maximum(shift - origin, NOTHING)
    left, left_a, left_b, right, right_a, right_b = _carried(carries, batch, chunk, channel, channels, chunks)
    left_e, right_e = tl.maximum(left, shift), tl.maximum(right, shift)
    shift_y = tl.maximum(tl.maximum(left_e, right_e), shift + u)
    to_left, to_right = tl.exp(shift - left_e)[None, :], tl.exp(shift - right_e)[None, :]
    left_to_y, right_to_y = tl.exp(left_e - shift_y)[None, :], tl.exp(right_e - shift_y)[None, :]
    own_to_y = tl.exp(shift + u - shift_y)[None, :]
    fade = tl.exp(-w)[None, :]
    pa, pb, sa, sb = _entering(xa, xb, w, ROWS, GROUPS)
    from_left, from_right = _fading(w, ROWS, GROUPS)
    scale = from_left * tl.exp(left - left_e)[None, :]
    pa, pb = pa * to_left + left_a[None, :] * scale, pb * to_left + left_b[None, :] * scale
    scale = from_right * tl.exp(right - right_e)[None, :]
    sa, sb = sa * to_right + right_a[None, :] * scale, sb * to_right + right_b[None, :] * scale
    right_a, right_b = _behind(xa, xb, sa, sb, fade, to_right, ROWS)

    left_a = ()
    left_b = ()
    ga = ()
    gb = ()
    gu = tl.zeros([GROUPS, WIDTH], tl.float32)
    for r in tl.static_range(ROWS):
        denominator = pb * left_to_y + right_b[r] * right_to_y + xb[r] * own_to_y
        out = (pa * left_to_y + right_a[r] * right_to_y + xa[r] * own_to_y) / denominator
        g = gy[r] / denominator
        gu += g * (xa[r] - xb[r] * out)
        left_a, left_b = left_a + (pa,), left_b + (pb,)
        ga, gb = ga + (g * out,), gb + (g,)
        pa, pb = pa * fade + xa[r] * to_left, pb * fade + xb[r] * to_left

    shift_g = -shift_y
    g_left, g_left_a, g_left_b, g_right, g_right_a, g_right_b = _carried(
        gradient_carries, batch, chunk, channel, channels, chunks
    )
    g_left_e, g_right_e = tl.maximum(g_left, shift_g), tl.maximum(g_right, shift_g)
    to_left, to_right = tl.exp(shift_g - g_left_e)[None, :], tl.exp(shift_g - g_right_e)[None, :]
    # what a token gives to others never exceeds its key by far: no factor overflows
    left_to_k, right_to_k = tl.exp(shift + g_left_e)[None, :], tl.exp(shift + g_right_e)[None, :]
    pa, pb, sa, sb = _entering(ga, gb, w, ROWS, GROUPS)
    scale = from_left * tl.exp(g_left - g_left_e)[None, :]
    pa, pb = pa * to_left + g_left_a[None, :] * scale, pb * to_left + g_left_b[None, :] * scale
    scale = from_right * tl.exp(g_right - g_right_e)[None, :]
    sa, sb = sa * to_right + g_right_a[None, :] * scale, sb * to_right + g_right_b[None, :] * scale
    g_right_a, g_right_b = _behind(ga, gb, sa, sb, fade, to_right, ROWS)

    gk = ()
    gv = ()
    rightwards = tl.zeros([GROUPS, WIDTH], tl.float32)
    leftwards = tl.zeros([GROUPS, WIDTH], tl.float32)
    for r in tl.static_range(ROWS):
        rightwards += left_a[r] * g_right_b[r] - left_b[r] * g_right_a[r]
        leftwards += right_a[r] * pb - right_b[r] * pa
        from_a = pa * left_to_k + g_right_a[r] * right_to_k + ga[r] * own_to_y
        from_b = pb * left_to_k + g_right_b[r] * right_to_k + gb[r] * own_to_y
        gv = gv + (xb[r] * from_b,)
        gk = gk + (xa[r] * from_b - xb[r] * from_a,)
        pa, pb = pa * fade + ga[r] * to_left, pb * fade + gb[r] * to_left
    _store(grad_key, gk, batch, chunk, channel, within, tokens, channels, ROWS, GROUPS)
    _store(grad_value, gv, batch, chunk, channel, within, tokens, channels, ROWS, GROUPS)
    # an exponent beyond 75 belongs to an empty sum: a sequence of one or two tokens has no distances
    gw = tl.sum(rightwards, 0) * tl.exp(tl.minimum(left_e + g_right_e - w, 80.0))
    gw += tl.sum(leftwards, 0) * tl.exp(tl.minimum(right_e + g_left_e - w, 80.0))
    share = (batch * chunks + chunk) * channels + channel
    tl.store(shares_w + share, gw, within)
    tl.store(shares_u + share, tl.sum(gu * own_to_y, 0), within)


@triton.jit
def parameter_gradients(
    shares_w, shares_u, decay, first, grad_decay, grad_first, tokens, channels, rows,
    LIMIT: tl.constexpr, LIMIT_U: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up all shares of a channel, `rows` of them, always in the same order."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    within = channel < channels
    channel = tl.minimum(channel, channels - 1)
    gw = tl.zeros([64, WIDTH], tl.float32)
    gu = tl.zeros([64, WIDTH], tl.float32)
    for start in range(0, rows, 64):
        row = (start + tl.arange(0, 64)).to(tl.int64)[:, None]
        at = row * channels + channel[None, :]
        gw += tl.load(shares_w + at, row < rows, 0.0)
        gu += tl.load(shares_u + at, row < rows, 0.0)
    bounded = tl.abs(tl.load(decay + channel).to(tl.float32)) > LIMIT
    gw = tl.where(bounded, 0.0, -tl.sum(gw, 0) / tokens)
    bounded = tl.abs(tl.load(first + channel).to(tl.float32)) > LIMIT_U * tokens
    gu = tl.where(bounded, 0.0, tl.sum(gu, 0) / tokens)
    tl.store(grad_decay + channel, gw.to(grad_decay.dtype.element_ty), within)
    tl.store(grad_first + channel, gu.to(grad_first.dtype.element_ty), within)


@triton.jit
def _place(channels, chunks, WIDTH: tl.constexpr):
    """Batch, chunk and channels of this program, and which channels exist; the others repeat the last one.

    Blocks of channels run fastest, so that neighbours share rows of memory.
    """
    blocks = tl.cdiv(channels, WIDTH)
    program = tl.program_id(0)
    channel = program % blocks * WIDTH + tl.arange(0, WIDTH)
    rest = program // blocks
    return (
        (rest // chunks).to(tl.int64),
        (rest % chunks).to(tl.int64),
        tl.minimum(channel, channels - 1),
        channel < channels,
    )


@triton.jit
def _bounded(pointer, channel, limit):
    """Parameters within +-limit; NaN stays NaN."""
    x = tl.load(pointer + channel).to(tl.float32)
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x)).to(tl.float32)


@triton.jit
def _load(
    pointer, batch, chunk, channel, tokens, per_batch, per_token, ROWS: tl.constexpr, GROUPS: tl.constexpr, other
):
    """A chunk's tokens as float32, one tile per row of all groups; `other` behind the last token."""
    start = chunk * (ROWS * GROUPS)
    base = pointer + batch * per_batch + start * per_token + channel[None, :]
    tiles = ()
    for r in tl.static_range(ROWS):
        row = tl.arange(0, GROUPS)[:, None] * ROWS + r
        tiles = tiles + (tl.load(base + row * per_token, start + row < tokens, other).to(tl.float32),)
    return tiles


@triton.jit
def _store(pointer, tiles, batch, chunk, channel, within, tokens, channels, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Store a chunk's tokens to a contiguous (B, T, C)."""
    start = chunk * (ROWS * GROUPS)
    base = pointer + (batch * tokens + start) * channels + channel[None, :]
    for r in tl.static_range(ROWS):
        row = tl.arange(0, GROUPS)[:, None] * ROWS + r
        tile = tiles[r].to(pointer.dtype.element_ty)
        tl.store(base + row * channels, tile, (start + row < tokens) & within[None, :])


@triton.jit
def _largest(k, ROWS: tl.constexpr):
    """The largest key of the chunk per channel; finite where all are -inf."""
    largest = k[0]
    for r in tl.static_range(1, ROWS):
        largest = tl.maximum(largest, k[r])
    return tl.maximum(tl.max(largest, 0), NOTHING)


@triton.jit
def _weighted(k, v, shift, ROWS: tl.constexpr):
    """The terms of both sums: exp(k - shift) v, and exp(k - shift)."""
    a = ()
    b = ()
    for r in tl.static_range(ROWS):
        weight = tl.exp(k[r] - shift[None, :])
        a = a + (weight * v[r],)
        b = b + (weight,)
    return a, b


@triton.jit
def _totals(x, fade, ROWS: tl.constexpr):
    """The sum over a group as seen from just behind it, and as seen from just before it."""
    end = x[0]
    start = x[ROWS - 1]
    for r in tl.static_range(1, ROWS):
        end = end * fade + x[r]
        start = start * fade + x[ROWS - 1 - r]
    return end, start


@triton.jit
def _store_sums(
    sums, batch, chunk, chunks, channel, channels, within, w, shift, a, b, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Store a chunk's shift and sums; what lies behind the last token must be zero."""
    fade = tl.exp(-w)[None, :]
    a_end, a_start = _totals(a, fade, ROWS)
    b_end, b_start = _totals(b, fade, ROWS)
    to_start, to_end = _fading(w, ROWS, GROUPS)
    plane = chunks * channels
    out = sums + batch * 5 * plane + chunk * channels + channel
    tl.store(out, shift, within)
    tl.store(out + plane, tl.sum(a_end * to_end, 0), within)
    tl.store(out + 2 * plane, tl.sum(b_end * to_end, 0), within)
    tl.store(out + 3 * plane, tl.sum(a_start * to_start, 0), within)
    tl.store(out + 4 * plane, tl.sum(b_start * to_start, 0), within)


@triton.jit
def _fading(w, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """What is left of a sum on its way from the chunk's start to a group's start, and from the chunk's end to its end."""
    group = tl.arange(0, GROUPS)[:, None]
    return tl.exp(-w[None, :] * (group * ROWS)), tl.exp(-w[None, :] * ((GROUPS - 1 - group) * ROWS))


@triton.jit
def _entering(xa, xb, w, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Per group, a and b of the groups before it, and of those behind it. Nothing is subtracted: no digits are lost."""
    fade = tl.exp(-w)[None, :]
    a_end, a_start = _totals(xa, fade, ROWS)
    b_end, b_start = _totals(xb, fade, ROWS)
    to = tl.arange(0, GROUPS)[None, :, None]
    between = tl.arange(0, GROUPS)[:, None, None] - to
    between = between + tl.zeros([GROUPS, GROUPS, xa[0].shape[1]], tl.int32)
    rate = w[None, None, :] * ROWS
    before = tl.where(between < 0, tl.exp(rate * (between + 1)), 0.0)
    behind = tl.where(between > 0, tl.exp(-rate * (between - 1)), 0.0)
    return (
        tl.sum(a_end[:, None, :] * before, 0),
        tl.sum(b_end[:, None, :] * before, 0),
        tl.sum(a_start[:, None, :] * behind, 0),
        tl.sum(b_start[:, None, :] * behind, 0),
    )


@triton.jit
def _behind(xa, xb, a, b, fade, scale, ROWS: tl.constexpr):
    """Per token, a and b of the tokens behind it, from what enters its group behind."""
    all_a = ()
    all_b = ()
    for r in tl.static_range(ROWS):
        all_a, all_b = (a,) + all_a, (b,) + all_b
        a, b = a * fade + xa[ROWS - 1 - r] * scale, b * fade + xb[ROWS - 1 - r] * scale
    return all_a, all_b


@triton.jit
def _carried(carries, batch, chunk, channel, channels, chunks):
    """Exponent, a and b of all chunks to the left of this one and of all to the right."""
    plane = chunks * channels
    at = carries + batch * 6 * plane + chunk * channels + channel
    return (
        tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane),
        tl.load(at + 3 * plane), tl.load(at + 4 * plane), tl.load(at + 5 * plane),
    )  # fmt: skip


@triton.jit
def _outputs(
    k, v, w, u, origin, carries, batch, chunk, channel, channels, chunks, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Outputs and denominators per token, the latter over exp(shift), and the shift. Exponents count from `origin`."""
    left, left_a, left_b, right, right_a, right_b = _carried(carries, batch, chunk, channel, channels, chunks)
    largest = _largest(k, ROWS)
    xa, xb = _weighted(k, v, largest, ROWS)
    largest = tl.maximum(largest - origin, NOTHING)
    shift = tl.maximum(tl.maximum(left, right), tl.maximum(largest, largest + u))
    scale = tl.exp(largest - shift)[None, :]
    own = tl.exp(largest + u - shift)[None, :]
    pa, pb, sa, sb = _entering(xa, xb, w, ROWS, GROUPS)
    from_left, from_right = _fading(w, ROWS, GROUPS)
    from_left *= tl.exp(left - shift)[None, :]
    from_right *= tl.exp(right - shift)[None, :]
    pa, pb = pa * scale + left_a[None, :] * from_left, pb * scale + left_b[None, :] * from_left
    sa, sb = sa * scale + right_a[None, :] * from_right, sb * scale + right_b[None, :] * from_right
    fade = tl.exp(-w)[None, :]
    behind_a, behind_b = _behind(xa, xb, sa, sb, fade, scale, ROWS)
    y = ()
    denominators = ()
    for r in tl.static_range(ROWS):
        denominator = pb + behind_b[r] + xb[r] * own
        y = y + ((pa + behind_a[r] + xa[r] * own) / denominator,)
        denominators = denominators + (denominator,)
        pa, pb = pa * fade + xa[r] * scale, pb * fade + xb[r] * scale
    return y, denominators, shift
