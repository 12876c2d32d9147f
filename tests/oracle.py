"""Eq. 6 to 9 of TruePose read from docs/paper.md 1 and 3, one sample, loops over query, key and head.

Written from the text, not from truepose_jax. `xp` is numpy (values) or torch (gradients by its autograd): every array
is of that library and float64. n keys of F' [n c], m queries of F [m c]; weights are [in out].
"""

import math


def weight_eq6(a, inside, *, delta, sigma, reading):
    """M'_ij of Eq. 6 for a logit A'_ij and its M_ij; `prose` swaps the two weights outside the mask (A23)."""
    if a > 0 and inside:
        return 1 + delta
    if a < 0 and inside:
        return delta
    if a > 0 and not inside:
        return sigma if reading == "printed" else 1 + sigma
    if a < 0 and not inside:
        return 1 + sigma if reading == "printed" else sigma
    return 0.0  # a = 0: a times any weight is 0


def m_ij(mask, i, j, mask_axis):
    """M_ij of query i and key j (A1)."""
    if mask_axis == "key":
        return bool(mask[j])
    if mask_axis == "query":
        return bool(mask[i])
    if mask_axis == "outer":
        return bool(mask[i]) and bool(mask[j])
    raise ValueError(mask_axis)


def scores(q, k, heads, head):
    """[[logit of query i and key j]] of one head: q_i . k_j / sqrt(d)."""
    d = q.shape[1] // heads
    own = slice(head * d, (head + 1) * d)
    return [[(q[i, own] * k[j, own]).sum() / math.sqrt(d) for j in range(len(k))] for i in range(len(q))]


def softmax_row(xp, row):
    top = max(float(getattr(a, "detach", lambda a=a: a)()) for a in row)
    e = [xp.exp(a - top) for a in row]
    total = sum(e)
    return [x / total for x in e]


def attend(xp, logits_of_head, v, heads):
    """softmax over keys, times v, heads concatenated: [queries c]."""
    d = v.shape[1] // heads
    rows = []
    for i in range(len(logits_of_head(0))):
        parts = []
        for head in range(heads):
            p = softmax_row(xp, logits_of_head(head)[i])
            parts.append(sum(p[j] * v[j, head * d : (head + 1) * d] for j in range(len(v))))
        rows.append(xp.concatenate(parts))
    return xp.stack(rows)


def eq7(xp, q, k, v, mask, *, heads, delta, sigma, reading, mask_axis):
    """H' = softmax(A' * M') V', heads concatenated, without an output projection (A15)."""
    weighted = []
    for head in range(heads):
        a = scores(q, k, heads, head)
        if mask_axis != "none":
            for i in range(len(q)):
                for j in range(len(k)):
                    inside = m_ij(mask, i, j, mask_axis)
                    a[i][j] = a[i][j] * weight_eq6(a[i][j], inside, delta=delta, sigma=sigma, reading=reading)
        weighted.append(a)
    return attend(xp, lambda head: weighted[head], v, heads)


def eq8(xp, q, k, v, *, heads):
    """softmax(Q K^T / sqrt d) V, heads concatenated."""
    found = [scores(q, k, heads, head) for head in range(heads)]
    return attend(xp, lambda head: found[head], v, heads)


def layer_norm(xp, x, scale, bias):
    rows = []
    for row in x:
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / xp.sqrt(variance + 1e-5) * scale + bias)
    return xp.stack(rows)


def hpfa(xp, p, source, x, mask, *, heads, delta=0.6, sigma=0.3, reading="printed", mask_axis="key"):
    """(the update HPFA adds to x [m c], K_h', V_h'). p: {'source_to_q': W_Q', ..., 'to_k': W of K_h' from H', ...,
    'norm_scale', 'norm_bias', 'to_q': W_Q, 'out', 'out_bias'}."""
    q, k, v = (source @ p[f"source_to_{name}"] for name in "qkv")
    settings = {"delta": delta, "sigma": sigma, "reading": reading, "mask_axis": mask_axis}
    h = eq7(xp, q, k, v, mask, heads=heads, **settings)
    k_h, v_h = h @ p["to_k"], h @ p["to_v"]
    query = layer_norm(xp, x, p["norm_scale"], p["norm_bias"]) @ p["to_q"]
    return eq8(xp, query, k_h, v_h, heads=heads) @ p["out"] + p["out_bias"], k_h, v_h


def average_scores(q, k, coverage, heads):
    """{region: mean of A' over heads and queries, keys weighted by the region's coverage} (A17), from all n x n."""
    found = {}
    a = [scores(q, k, heads, head) for head in range(heads)]
    for region in range(coverage.shape[1]):
        total, weight = 0.0, 0.0
        for head in range(heads):
            for i in range(len(q)):
                for j in range(len(k)):
                    total += coverage[j, region] * a[head][i][j]
                    weight += coverage[j, region]
        if weight > 0:
            found[region] = total / weight
    return found


def chosen_regions(average, present, count):
    """The `count` present regions of lowest average (fewer where fewer are there)."""
    there = [region for region in average if present[region]]
    return sorted(there, key=lambda region: float(average[region]))[:count]


def caa(xp, p, x, tokens, regions, *, heads):
    """Eq. 9's update for the normed hidden state x [m c]: to_q, to_k, to_v, out, out_bias in p; tokens [regions e].

    Without any region the attention term is 0 and out's bias stays (A19)."""
    if len(regions) == 0:
        return xp.stack([p["out_bias"]] * len(x))
    clip = xp.stack([tokens[r] for r in regions])
    return eq8(xp, x @ p["to_q"], clip @ p["to_k"], clip @ p["to_v"], heads=heads) @ p["out"] + p["out_bias"]
