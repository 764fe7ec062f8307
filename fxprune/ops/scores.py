"""What tokens are scored by: attention weights, alone or with the norms of values."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Shape, define
from .reduction import full

KINDS = ("class-value", "class", "entropy-value", "received-value")
"""What ``token_score`` takes: the token's weight in the class token's attention times its value's norm; that weight
alone; the entropy of the token's own attention times the norm; the attention it gets on average times the norm."""

_LOG_EPS = 1e-8
_SUM_EPS = 1e-12


def attention_map(query: Tensor, key: Tensor, size: Tensor | None, scale: float, rows: int) -> Tensor:
    """Attention weights, which fused attention does not give away: ``softmax(scale q k^T + log size)``.

    The size term is ToMe's proportional attention (Bolya et al., ICLR 2023, equation 1): a key of size 2 weighs as
    much as two equal keys.

    query    [batch, heads, tokens, d]
    key      [batch, heads, tokens, d]
    size     input tokens that each token stands for, None for ones. [batch, tokens, 1]
    scale    of the logits, as a rule 1 / sqrt(d)
    rows     how many queries, from the first: 1 for the class token, 0 for all
    returns  [batch, heads, rows, tokens]
    """
    if not 0 <= rows <= query.shape[2]:
        raise ValueError(f"There are {query.shape[2]} queries, so 'rows' cannot be {rows}.")
    if rows:
        query = query[:, :, :rows]
    logits = (query * scale) @ key.transpose(2, 3)  # scaled before, which half precision needs
    if size is not None:
        logits = logits + full(size).log().to(logits.dtype).transpose(1, 2)[:, None]
    return logits.softmax(-1)


def attention_macs(query: Shape, key: Shape, size: Shape | None, scale: float, rows: int) -> int:
    """Every head's products of queries and keys. Of one sample."""
    return query[1] * (rows or query[2]) * key[2] * key[3]


def token_score(attention: Tensor, value: Tensor, kind: str, protected: int) -> Tensor:
    """How much each token matters, by ``kind``, summing to one over the unprotected tokens; 0 for protected ones.

    With ``v_t`` the norm of the value of token t over all heads together, and means over heads h and queries q:

    class-value     ``mean_h A[h, 0, t] v_t``: the score of ATS (Fayyaz et al., "Adaptive Token Sampling for Efficient
                    Vision Transformers", ECCV 2022, section 3.1) as PPT uses it
    class           ``mean_h A[h, 0, t]``
    entropy-value   ``mean_h(-sum_u A[h, t, u] log(A[h, t, u] + 1e-8)) v_t``: high for tokens that look everywhere
    received-value  ``mean_{h, q} A[h, q, t] v_t``: for models without a class token

    attention  [batch, heads, rows, tokens]: the class token's row for "class" and "class-value" (the first one is
               read), all rows for the others
    value      [batch, heads, tokens, d]
    protected  the first so many tokens get 0
    returns    [batch, tokens], in single precision for half precision arguments: in half precision scores tie

    Heads count as their mean; a sum is the same after normalising.
    """
    rows, tokens = attention.shape[2:]
    if kind not in KINDS:
        raise ValueError(f"A token score is one of {', '.join(KINDS)}, not {kind!r}.")
    if not 0 <= protected < tokens:
        raise ValueError(f"There are {tokens} tokens to score, so 'protected' cannot be {protected}.")
    if kind.startswith("class") and not protected:
        raise ValueError(f"The score {kind!r} reads the row of the class token, so at least one token is protected.")
    if kind in ("entropy-value", "received-value") and rows != tokens:
        raise ValueError(f"The score {kind!r} needs the attention of all {tokens} tokens, not of {rows}.")
    if kind.startswith("class"):
        score = full(attention[:, :, 0]).mean(1)
    elif kind == "entropy-value":
        weight = full(attention)
        score = -(weight * (weight + _LOG_EPS).log()).sum(-1).mean(1)
    else:
        score = full(attention).mean((1, 2))
    if kind != "class":
        value = full(value)
        score = score * (value * value).sum((1, 3)).sqrt()
    free = score[:, protected:]
    free = free / free.sum(-1, keepdim=True).clamp_min(_SUM_EPS)
    return torch.cat([torch.zeros_like(score[:, :protected]), free], 1)


def score_macs(attention: Shape, value: Shape, kind: str, protected: int) -> int:
    """Sums only, no product of matrices."""
    return 0


ATTENTION = define(
    "attention_map",
    "(Tensor query, Tensor key, Tensor? size, float scale, int rows) -> Tensor",
    attention_map,
    attention_macs,
)
SCORE = define(
    "token_score", "(Tensor attention, Tensor value, str kind, int protected) -> Tensor", token_score, score_macs
)
