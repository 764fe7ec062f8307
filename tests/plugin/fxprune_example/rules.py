"""Axis rules for the ops of one library: what their output's dimensions are made of."""

from fxprune.extend import Args, Dims, Product, Walk, declare, rule


@rule("fxprune_example::twist")
def twisted(w: Walk, a: Args) -> Dims:
    return list(a.x)  # element by element: every dimension is the input's


@rule("fxprune_example::dense")
def multiplied(w: Walk, a: Args) -> Dims:
    """y[.., o] = x[.., i] weight[o, i]"""
    w.unify(a.x[-1], a.weight[1])
    w.contract(a.weight[1], ("x", len(a.x) - 1), ("weight", 1))  # summed over: criteria look here
    w.matmul(a.x[:-1], (), a.weight[1], a.weight[0], "linear")  # what it costs
    w.tag("produce", a.weight[0])
    return [*a.x[:-1], a.weight[0]]


declare("fxprune_example::dense", Product("x", "weight"))  # recovery solves for it as it does for linear
