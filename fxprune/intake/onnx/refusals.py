"""Ops that no translation would bring in: what they are, why not, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import LoadError
from .graph import Node

CUTS: Mapping[str, int] = {"NonMaxSuppression": 2}
"""Ops before which the graph ends, and how many of their inputs are outputs then: what stands behind is no layer."""
_QUANTISED = (
    "the graph is quantised",
    "{op} computes with whole numbers and scales, which cannot be scored or solved for",
    "give the model as it was before quantisation; the result can be quantised afterwards",
)
_CONTROL = (
    "control flow cannot be pruned",
    "{op} decides by values which graph runs",
    "export the model without it: for a shape that is fixed, onnx-simplifier takes the branch that is taken",
)
_RECURRENT = (
    "recurrent layers cannot be pruned",
    "{op} reads its own output, step by step, and its gates lie in one weight",
    "give the part without it: onnx.utils.extract_model(...) cuts a file between two values",
)
_VALUES = (
    "the size of a result depends on values",
    "{op} gives as many elements as its input's values say",
    "end the model before it: onnx.utils.extract_model(...) cuts a file between two values",
)
_RANDOM = ("the model draws random numbers", "{op} gives others each time", "make what it draws an input of the model")
_NO_TENSORS = (
    "sequences, optional values and texts cannot be pruned",
    "{op} works on what is no tensor",
    "give the part that computes with tensors: onnx.utils.extract_model(...) cuts a file between two values",
)
_REASONS: Mapping[tuple[str, str, str], str] = {
    _QUANTISED: "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul MatMulInteger "
    "ConvInteger com.microsoft::QAttention com.microsoft::QGemm com.microsoft::MatMulNBits "
    "com.microsoft::DynamicQuantizeMatMul com.microsoft::DynamicQuantizeLSTM com.microsoft::MatMulIntegerToFloat "
    "com.microsoft::QLinearAdd com.microsoft::QLinearMul com.microsoft::QLinearSigmoid com.microsoft::QLinearConcat "
    "com.microsoft::QLinearGlobalAveragePool com.microsoft::QLinearAveragePool com.microsoft::QLinearLeakyRelu "
    "com.microsoft::QLinearSoftmax com.microsoft::QEmbedLayerNormalization com.microsoft::QuantizeLinear "
    "com.microsoft::DequantizeLinear com.microsoft::MatMulBnb4 com.microsoft::GatherBlockQuantized",
    _CONTROL: "If Loop Scan SequenceMap",
    _RECURRENT: "LSTM GRU RNN com.microsoft::AttnLSTM",
    _VALUES: "NonZero Unique Compress",
    _RANDOM: "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli",
    _NO_TENSORS: "SequenceConstruct SequenceAt SequenceInsert SequenceErase SequenceEmpty SequenceLength "
    "SplitToSequence ConcatFromSequence Optional OptionalGetElement OptionalHasElement StringNormalizer StringConcat "
    "StringSplit RegexFullMatch TfIdfVectorizer LabelEncoder",
}
_OF_OP = {op: reason for reason, ops in _REASONS.items() for op in ops.split()}


def refuse(node: Node, path: Path) -> None:
    """Raise LoadError for an op that cannot be translated, with its node, the reason and the cure."""
    found = _OF_OP.get(node.op)
    if found is None:
        return
    what, why, cure = found
    raise LoadError(what, where=f"{path}: {node}", why=why.format(op=node.op.rpartition("::")[2]), cure=cure)
