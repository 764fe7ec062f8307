"""What is known of ops, in one table; and where a layer's output goes: through moves, scales and sums into a residual
stream, and the norm that reads it.

An op stands here once: in one family, which says what it does with elements, and, where it multiplies, with the names
of what it multiplies. Whoever needs a list of ops names the families of it. What torch says itself is not repeated:
that an op is element-wise, random, a view or writes in place stands in its schema and its tags.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.operator_schemas import get_signature_for_torch_op

from .guards import is_same_size


class Family(str, Enum):
    """What an op does with the elements of its first tensor."""

    RESHAPE = "other sizes, the same order"
    PERMUTE = "dims change places"
    UNIT = "dims of size one come and go"
    SAME = "the input itself, under another name"
    COPY = "the same elements elsewhere in memory"
    CAST = "the same elements in another dtype"
    DROPOUT = "the input itself, in evaluation form"
    SHIFT = "elements of a dim change places"
    PART = "a run of a dim"
    PICK = "single positions of a dim"
    SPLIT = "several runs of a dim"
    JOIN = "tensors side by side"
    EXPAND = "a dim of size one becomes n alike"
    REPEAT = "n copies of a dim"
    PAD = "a dim with a border"
    WINDOW = "sliding windows"
    SHUFFLE = "channels become pixels, or the other way round"
    PAIRS = "complex numbers as pairs of real ones, or the other way round"
    TABLE = "rows of a table by number"
    LOOKUP = "positions by index"
    SCATTER = "written into by index"
    LIKE = "a constant of the same shape"
    CREATE = "a tensor from nothing"
    POINTWISE = "element by element"
    ADD = "element by element: a sum"
    MULTIPLY = "element by element: a product"
    COMPARE = "element by element: true or false"
    STEEP = "element by element: powers, exponentials, logarithms, roots, which leave the range of half precision"
    FILL = "element by element: numbers that say as far as it goes"
    GATE = "element by element, after its own rule for channels"
    SOFTMAX = "a softmax"
    LOG_SOFTMAX = "the logarithm of a softmax"
    LAYER_NORM = "normalised by the variance of a row"
    RMS_NORM = "normalised by the power of a row"
    GROUP_NORM = "normalised by the variance of a group of channels"
    INSTANCE_NORM = "normalised by the variance of a channel"
    BATCH_NORM = "normalised by running statistics"
    SUM = "the sum over dims"
    MEAN = "the mean over dims"
    VARIANCE = "the variance over dims"
    NORM = "the length of vectors"
    EXTREME = "the largest or smallest over dims"
    REDUCE = "another number per row"
    COUNT = "a whole number or truth value per row"
    CUMULATE = "running sums and products"
    ORDER = "by size or place"
    DISTANCE = "how far or near vectors are"
    PRODUCT = "a matrix product"
    CONVOLUTION = "a convolution"
    ATTENTION = "attention, fused"
    POOL = "windows averaged or their largest"
    RESAMPLE = "a picture at other sizes"
    TOKENS = "what token reduction puts in"
    CHECK = "a check, and no value"


F = Family
_FAMILIES: dict[Family, str] = {
    F.RESHAPE: "view reshape _unsafe_view _reshape_alias flatten unflatten view_as reshape_as ravel",
    F.PERMUTE: "permute transpose t numpy_T mT swapaxes swapdims movedim moveaxis adjoint matrix_H",
    F.UNIT: "squeeze unsqueeze atleast_1d atleast_2d atleast_3d",
    F.SAME: "alias detach lift lift_fresh",
    F.COPY: "contiguous clone lift_fresh_copy",
    F.CAST: "to _to_copy type_as",
    F.DROPOUT: "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
    F.SHIFT: "roll flip",
    F.PART: "slice narrow slice_copy",
    F.PICK: "select unbind",
    F.SPLIT: "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk hsplit getitem",
    F.JOIN: "cat concat concatenate stack hstack vstack row_stack column_stack dstack",
    F.EXPAND: "expand expand_as broadcast_to broadcast_tensors",
    F.REPEAT: "repeat tile repeat_interleave meshgrid",
    F.PAD: "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    F.WINDOW: "unfold im2col col2im",
    F.SHUFFLE: "pixel_shuffle pixel_unshuffle channel_shuffle",
    F.PAIRS: "view_as_complex view_as_real",
    F.TABLE: "embedding embedding_bag",
    F.LOOKUP: "index _unsafe_index index_select gather take_along_dim",
    F.SCATTER: "index_put index_add index_copy index_fill scatter scatter_add masked_scatter slice_scatter "
    "select_scatter",
    F.LIKE: "zeros_like ones_like full_like empty_like rand_like",
    F.CREATE: "full zeros ones empty new_full new_zeros new_ones new_empty arange linspace logspace eye scalar_tensor "
    "tensor triu_indices tril_indices rand randn randint hann_window one_hot",
    # of the element-wise ops only those that torch does not tag as pointwise, or that somebody tells from the rest
    F.POINTWISE: "__and__ __or__ floor_divide hardswish log_sigmoid polar complex real imag _conj resolve_conj divide "
    "negative absolute fix arccos arccosh arcsin arcsinh arctan arctan2 arctanh",
    F.ADD: "add sub subtract",
    F.MULTIPLY: "mul multiply",
    F.COMPARE: "eq ne lt le gt ge greater greater_equal less less_equal not_equal logical_not logical_and logical_or "
    "logical_xor",
    F.STEEP: "pow exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal",
    F.FILL: "masked_fill where fill copy clamp clamp_min clamp_max",
    F.GATE: "glu prelu",
    F.SOFTMAX: "softmax _softmax _safe_softmax",
    F.LOG_SOFTMAX: "log_softmax _log_softmax",
    F.LAYER_NORM: "layer_norm native_layer_norm",
    F.RMS_NORM: "rms_norm _fused_rms_norm",
    F.GROUP_NORM: "group_norm native_group_norm",
    F.INSTANCE_NORM: "instance_norm",
    F.BATCH_NORM: "batch_norm native_batch_norm cudnn_batch_norm _batch_norm_impl_index _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training",
    F.SUM: "sum",
    F.MEAN: "mean",
    F.VARIANCE: "var std var_mean std_mean",
    F.NORM: "norm linalg_vector_norm linalg_norm frobenius_norm",
    F.EXTREME: "max min amax amin aminmax",
    F.REDUCE: "nansum prod logsumexp trace",
    F.COUNT: "argmax argmin any all count_nonzero histc bincount",
    F.CUMULATE: "cumsum cumprod logcumsumexp",
    F.ORDER: "cummax cummin sort argsort msort topk median mode tril triu diagonal diag_embed",
    F.DISTANCE: "cdist cosine_similarity",
    F.PRODUCT: "linear addmm mm matmul bmm baddbmm mv addmv dot inner outer ger tensordot einsum _grouped_mm "
    "transformers::grouped_mm_fallback fxprune::block_sparse_linear",
    F.CONVOLUTION: "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    F.ATTENTION: "scaled_dot_product_attention",
    F.POOL: "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d "
    "max_unpool2d max_unpool3d",
    F.RESAMPLE: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d __interpolate grid_sampler "
    "grid_sampler_2d grid_sampler_3d",
    F.TOKENS: "fxprune::merge_tokens fxprune::prune_tokens fxprune::adapt_tokens fxprune::transform_tokens "
    "fxprune::pagerank_tokens fxprune::drop_tokens fxprune::remove_token fxprune::attention_map fxprune::token_score "
    "fxprune::restore_tokens",
    F.CHECK: "_assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size "
    "_functional_assert_async _functional_sym_constrain_range _functional_sym_constrain_range_for_size",
}
_KNOWN: dict[str, Family] = {name: one for one, names in _FAMILIES.items() for name in names.split()}


@dataclass(frozen=True)
class Product:
    """``left`` times ``right``, plus ``added`` ("" for nothing): linear in each of the two. Names of arguments.

    form   how a weight at ``right`` lies, so that it can be solved for: ``linear`` y = x W^T, W [out, in];
           ``transposed`` y = x W, W [in, out]; ``conv`` W [out, in / groups, ..kernel]; ``deconv`` W [in, out / groups,
           ..kernel] and "" for all else, which is not solved for
    """

    left: str
    right: str
    added: str = ""
    form: str = "linear"


_CONV, _DECONV = Product("input", "weight", "bias", "conv"), Product("input", "weight", "bias", "deconv")
_PRODUCTS: dict[str, Product] = {
    "linear": Product("input", "weight", "bias"),
    "addmm": Product("mat1", "mat2", "self", "transposed"),
    "mm": Product("self", "mat2", "", "transposed"),
    "matmul": Product("self", "other", "", "transposed"),
    "bmm": Product("self", "mat2", form=""),
    "baddbmm": Product("batch1", "batch2", "self", form=""),
    "inner": Product("self", "other", form=""),
    "tensordot": Product("self", "other", form=""),
    "_grouped_mm": Product("self", "mat2", form=""),
    "transformers::grouped_mm_fallback": Product("input", "weight", form=""),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _DECONV),
}

# ---------------------------------------------------------------- families that are asked for together

VIEWS = frozenset({F.RESHAPE, F.PERMUTE, F.UNIT, F.SAME, F.COPY, F.CAST})
"""Every element stays, seen otherwise."""
MOVES = VIEWS | {F.DROPOUT, F.SHIFT, F.PART}
"""Elements are moved, dropped or copied, each to one place of its own (dropout in evaluation form)."""
ELEMENTWISE = frozenset({F.POINTWISE, F.ADD, F.MULTIPLY, F.COMPARE, F.STEEP, F.FILL})
ROW_NORMS = frozenset({F.LAYER_NORM, F.RMS_NORM})
NORMS = ROW_NORMS | {F.GROUP_NORM, F.INSTANCE_NORM}
"""Norms by statistics of the sample itself."""
MULTIPLIES = frozenset({F.PRODUCT, F.CONVOLUTION})


def declare(op: str, fact: Family | Product) -> None:
    """Say what an op of a plugin's library (``lib::op``) does: its family, or what it multiplies.

    >>> declare("mylib::dense", Product("x", "weight", "bias"))  # then it is recovered like linear
    """
    if isinstance(fact, Product):
        _PRODUCTS[op], fact = fact, F.CONVOLUTION if "conv" in fact.form else F.PRODUCT
    _KNOWN[op] = fact


def ops_in(*families: Family) -> frozenset[str]:
    """Names of the ops that the table has in these families (tags of torch add to ``POINTWISE``)."""
    return frozenset(name for name, one in _KNOWN.items() if one in families)


def family_of(name: str) -> Family | None:
    """What the table says of an op by name, see :func:`op_name`."""
    return _KNOWN.get(name)


def family(node: Node) -> Family | None:
    """What the node's op does: as the table says, else as torch's tags do; None where neither does."""
    found = _KNOWN.get(op_name(node))
    if found is None and isinstance(node.target, OpOverload) and not is_mutable(node):
        if torch.Tag.pointwise in node.target.tags:
            return F.POINTWISE
        return F.REDUCE if torch.Tag.reduction in node.target.tags else None
    return found


def product(node: Node) -> Product | None:
    """What the node multiplies, where it does."""
    return _PRODUCTS.get(op_name(node)) if node.op == "call_function" else None


def find_bias(node: Node) -> Node | None:
    """What a product adds (its bias), where it adds something."""
    one = product(node)
    found = bind(node).get(one.added) if one is not None else None
    return found if isinstance(found, Node) else None


def is_mutable(node: Node) -> bool:
    """Whether the op writes into one of its arguments."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def returns_view(node: Node) -> bool:
    """Whether the op may hand its input's memory on, as far as its schema says: composite ops do not always tell."""
    return isinstance(node.target, OpOverload) and any(r.alias_info is not None for r in node.target._schema.returns)


def op_name(node: Node) -> str:
    """``linear`` for aten.linear.default, ``lib::op`` for ops of other libraries, the name for plain functions."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return getattr(node.target, "__name__", str(node.target))


def bind(node: Node) -> dict[str, Any]:
    """Schema argument name -> argument, defaults filled in; positional names ``0``, ``1``.. for plain functions."""
    given = bind_values(node.target, node.args, node.kwargs)
    if not isinstance(node.target, OpOverload):
        return given
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in _schema(node.target)}


def arguments_by_name(node: Node) -> dict[str, Any]:
    """:func:`bind` for plain functions as well, by the names of their signatures; {} where none is known.

    A graph of dynamo's calls functions of ``torch.nn.functional``: the fifth argument of one attention is a dropout, of
    another a number of heads.
    """
    if isinstance(node.target, OpOverload):
        return bind(node)
    try:
        signatures = [inspect.signature(node.target)]  # type: ignore[arg-type]
    except (ValueError, TypeError):  # a builtin: torch knows its schemas
        signatures = get_signature_for_torch_op(node.target) or []  # type: ignore[arg-type]
    for signature in signatures:
        try:
            bound = signature.bind(*node.args, **node.kwargs)
        except TypeError:
            continue
        bound.apply_defaults()
        return dict(bound.arguments)
    return {}


def bind_values(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`bind` for given values, without defaults."""
    names = [a.name for a in _schema(target)] if isinstance(target, OpOverload) else map(str, range(len(args)))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _schema(target: OpOverload) -> Sequence[Any]:
    arguments: Sequence[Any] = target._schema.arguments
    return arguments


# ---------------------------------------------------------------- where an output goes


def goes_to(node: Node, bound: Collection[str]) -> tuple[tuple[str, ...], str, str, float]:
    """(path, target, norm, eps): follow the output through moves, scales and sums while nothing else reads it.

    target   the last sum before anything else reads the value; path: the nodes from the output to it
    norm     ``variance`` (layer norm), ``power`` (RMS norm) or "": how the norm that reads the target sees a row
    bound    placeholders that stand for parameters and buffers
    """
    path: list[str] = []
    current, target, summed = node, node, 0
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.op != "call_function" or not _passes(user, current, bound):
            break
        path.append(user.name)
        current = user
        if family(user) is F.ADD:
            target, summed = current, len(path)
    norm, eps = norm_after(target)
    return tuple(path[:summed]), target.name, norm, eps


def row_weight(norm: str, eps: float, z: Tensor) -> Tensor:
    """1 / (what the norm divides by)^2 per row of z: errors that the norm shrinks count less. [.., 1], or [] without"""
    wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if norm == "variance":
        return 1 / (wide.var(-1, keepdim=True, unbiased=False) + eps).clamp_min(1e-12)
    if norm == "power":
        return 1 / (wide.square().mean(-1, keepdim=True) + eps).clamp_min(1e-12)
    return wide.new_ones(())


def _passes(user: Node, source: Node, bound: Collection[str]) -> bool:
    """True for ops that give every element its own place, scaled and shifted by what does not depend on it."""
    does = family(user)
    if does in MOVES:
        return user.args[0] is source
    if does is F.MULTIPLY:  # a layer scale; a gate made of activations would be no constant
        others = [a for a in user.args if a is not source]
        return len(others) == 1 and (not isinstance(others[0], Node) or behind_views(others[0], MOVES).name in bound)
    if does is F.BATCH_NORM:
        args = bind(user)
        return args.get("input") is source and not args.get("training", False)
    return does is F.ADD


def behind_views(node: Node, through: Collection[Family] = VIEWS) -> Node:
    """What a node shows: itself, or what lies behind views of it (``x @ weight.T``)."""
    while node.op == "call_function" and family(node) in through and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_power(node: Node) -> bool:
    """The mean of squares, or their sum over a width that is a number."""
    return family(node) is F.MEAN or (family(node) is F.SUM and any(op_name(u) == "div" for u in node.users))


def _keeps_last(node: Node) -> bool:
    """Whether the last dim stays the last where dims change places: sizes alone do not tell (a picture as wide as it
    has channels)."""
    if family(node) is not F.PERMUTE:
        return True
    given, last = bind(node), len(node.meta["val"].shape) - 1
    if "dims" in given:
        return bool(given["dims"][-1] % (last + 1) == last)
    return "dim0" in given and last not in {given[name] % (last + 1) for name in ("dim0", "dim1")}


def norm_after(node: Node, depth: int = 3) -> tuple[str, float]:
    """How the norm that reads ``node`` sees its rows: by their variance, by their power, or not at all; and its eps."""
    width = node.meta["val"].shape[-1] if isinstance(node.meta.get("val"), Tensor) else None
    for user in node.users:
        does, args = family(user), bind(user)
        if does in ROW_NORMS and len(args.get("normalized_shape", ())) == 1:
            return "variance" if does is F.LAYER_NORM else "power", float(args.get("eps") or 0.0)
        if op_name(user) == "pow" and args.get("exponent") == 2 and any(map(_is_power, user.users)):
            return "power", 0.0
    for user in node.users if depth else ():
        value = user.meta.get("val")
        rows = width is not None and isinstance(value, Tensor) and value.dim() and is_same_size(value.shape[-1], width)
        if rows and family(user) in MOVES and _keeps_last(user):
            norm, eps = norm_after(user, depth - 1)
            if norm:
                return norm, eps
    return "", 0.0
