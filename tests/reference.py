"""Slow, exact references, written from the definitions and sharing no code with raymem."""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional as F

M64 = 2**64 - 1


def memorization(masks, correct):
    """Feldman & Zhang 2020, eq. 1: [T][N] -> [N], by a double loop; None where undefined."""
    T, N = len(masks), len(masks[0])
    found = []
    for i in range(N):
        inside = [float(correct[t][i]) for t in range(T) if masks[t][i]]
        outside = [float(correct[t][i]) for t in range(T) if not masks[t][i]]
        if inside and outside:
            found.append(sum(inside) / len(inside) - sum(outside) / len(outside))
        else:
            found.append(None)
    return found


def wilson(k, n, z):
    """Wilson's interval as the roots of (p - q)^2 = z^2 q (1 - q) / n in q."""
    p = k / n
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def philox4x64(counter, key, rounds=10):
    """Philox4x64 (Salmon et al. 2011, Figure 2) on four and two 64-bit integers."""
    x, (k0, k1) = list(counter), key
    for _ in range(rounds):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [
            (second >> 64) ^ x[1] ^ k0,
            second & M64,
            (first >> 64) ^ x[3] ^ k1,
            first & M64,
        ]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M64, (k1 + 0xBB67AE8584CAA73B) & M64
    return x


def random_words(seed, stream, index, n):
    """n 64-bit words of the stream (seed, stream) from counter (1, index, 0, 0) on."""
    words, low = [], 1
    while len(words) < n:
        words += philox4x64([low, index, 0, 0], (seed, stream))
        low += 1
    return words[:n]


def balanced_mask(n, members, block, seed, trial):
    """A balanced plan's mask: per example, the `members` trials of the block with smallest keys."""
    number, slot = divmod(trial, block)
    words = random_words(seed, 1, number, n * block)
    rows = [words[i * block : (i + 1) * block] for i in range(n)]
    return [slot in sorted(range(block), key=row.__getitem__)[:members] for row in rows]


def history(right_by_epoch):
    """(learning epoch, forgetting count) of one example that was right or wrong at each epoch."""
    learned = next((e + 1 for e in range(len(right_by_epoch)) if all(right_by_epoch[e:])), 0)
    pairs = itertools.pairwise(right_by_epoch)
    return learned, sum(1 for before, after in pairs if before and not after)


def crop_and_flip(image, down, right, flip, padding):
    """One image [H][W][C]: reflect-pad, cut the window moved by (down, right), mirror."""
    H, W = len(image), len(image[0])

    def reflected(at, size):
        while not 0 <= at < size:
            at = -at if at < 0 else 2 * (size - 1) - at
        return at

    rows = [reflected(row + down, H) for row in range(H)]
    columns = [reflected(column + right, W) for column in range(W)]
    if flip:
        columns = columns[::-1]
    return [[image[row][column] for column in columns] for row in rows]


def influence(masks, correct):
    """Feldman & Zhang 2020, eq. 2: [T][N], [T][M] -> [N][M], one column at a time."""
    T, N, M = len(masks), len(masks[0]), len(correct[0])
    found = [[None] * M for _ in range(N)]
    for j in range(M):
        right = [[correct[t][j]] * N for t in range(T)]
        for i, value in enumerate(memorization(masks, right)):
            found[i][j] = value
    return found


def hypergeometric_tail(k, n, m, T):
    """P(X >= k) of m marked among n drawn of T, in exact integers."""
    ways = sum(math.comb(m, j) * math.comb(T - m, n - j) for j in range(k, min(n, m) + 1))
    return ways / math.comb(T, n)


def kept_pairs(masks, correct, mem, y_train, y_test, *, least, least_mem, level, top, same_class):
    """The pairs a rule keeps, by looking at each: {(i, j): strong}."""
    T, values, kept = len(masks), influence(masks, correct), {}
    for j in range(len(y_test)):
        column = []
        for i in range(len(y_train)):
            value = values[i][j]
            if value is None or (same_class and y_train[i] != y_test[j]):
                continue
            column.append((-value, i))
            n_in, right = sum(mask[i] for mask in masks), sum(row[j] for row in correct)
            both = sum(mask[i] and row[j] for mask, row in zip(masks, correct, strict=True))
            p = hypergeometric_tail(both, n_in, right, T)
            if mem[i] >= least_mem and value >= least and p <= level:
                kept[i, j] = True
        for negative, i in sorted(column)[:top]:
            if negative < -1e-4:
                kept.setdefault((i, j), False)
    return kept


def input_hessian(model, image, label):
    """The Hessian of the cross entropy of an image [C, H, W] in its pixels, by autograd: [d, d]."""

    def loss(pixels):
        return F.cross_entropy(model(pixels.reshape(1, *image.shape)), torch.tensor([label]))

    return torch.autograd.functional.hessian(loss, image.flatten())


def input_gradient(model, image, label):
    """The gradient of the same: [d]."""
    pixels = image.clone().requires_grad_()
    loss = F.cross_entropy(model(pixels[None]), torch.tensor([label]))
    return torch.autograd.grad(loss, pixels)[0].flatten()


def rmia_scores(margins, masks, target, references, population, a):
    """Zarifzadeh et al. 2024, the definition with gamma 1 by a double loop over x and z: [N], None
    where it is undefined. Probabilities are compared in logarithms; `a` None: online."""

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    def log_ratio(i):
        means = {}
        for arm in (True, False):
            p = [math.exp(log_sigmoid(margins[t][i])) for t in references if masks[t][i] == arm]
            means[arm] = math.fsum(p) / len(p) if p else None
        if means[False] is None or (a is None and means[True] is None):
            return None
        inside = means[True] if a is None else a * means[False] + 1 - a
        return log_sigmoid(margins[target][i]) - math.log((inside + means[False]) / 2)

    ratios = [log_ratio(i) for i in range(len(margins[0]))]
    compared = [ratios[z] for z in population if ratios[z] is not None]
    return [None if x is None else sum(x >= z for z in compared) / len(compared) for x in ratios]
