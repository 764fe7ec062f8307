"""Recovery: where the closed forms apply, what they must never do, and that slicing stays masking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import laws, zoo
from support.blocks import Encoder, Parallel, ResidualConvolutions
from support.recovering import analysed, flat, floats, laws_hold, planned, recovered, sites_of, texts
from torch.fx import Interpreter, Node

from fxprune.cli.demo import Digits, DigitsViT
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.ir.group import Kind
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.stream import Stream
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.testing import relative_error, run_flat

# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(("norm", "says"), [("pre", "variance"), ("post", "variance"), ("rms", "power")])
def test_the_norm_behind_the_residual_sum_is_found(norm: str, says: str) -> None:
    sites, skipped = sites_of(planned(analysed(Encoder(norm), texts(16))))
    assert not skipped
    assert [s.reads for s in sites] == [True] * 4
    assert [s.norm for s in sites] == [says] * 3 + ["variance"]  # the last one is read by the final layer norm
    assert all(s.path and s.path[-1] == s.target and s.target.startswith("add") for s in sites)


def test_refit_adds_the_projections_that_read_a_changed_stream() -> None:
    sites, _ = sites_of(planned(analysed(Encoder(), texts(16))), refit=True)
    assert [s.reads for s in sites] == [True, False, True, False, False, False, True, False, True]
    assert all(not s.path and s.target == s.node for s in sites if not s.reads)


def test_shared_weights_are_left_alone() -> None:
    model = Encoder()
    model.layers[1].fc2.weight = model.layers[0].fc2.weight
    program = planned(analysed(model, texts(16)))
    _, skipped = sites_of(program)
    assert len(skipped) == 2
    assert set(skipped.values()) == {"its weight is shared with another layer"}
    laws_hold(program, recovered(program, texts(64))[0], texts(16, seed=9))


# ---------------------------------------------------------------- laws


@pytest.mark.drawn(5)
@pytest.mark.parametrize("method", ["bias", "scale", "ridge", "refit", "auto"])
@pytest.mark.parametrize("norm", ["pre", "post", "rms"])
def test_every_step_lowers_its_error_and_slicing_stays_masking(norm: str, method: str) -> None:
    data = texts(96)
    program = planned(analysed(Encoder(norm, bias=norm != "rms"), data))
    after, report = recovered(program, data, method)
    laws_hold(program, after, texts(16, seed=9))
    assert all(s.after <= s.before * (1 + 1e-9) for s in report.steps)
    assert after.exported.graph_signature == program.exported.graph_signature
    if method in ("ridge", "refit"):
        assert min(s.after / s.before for s in report.steps) < 0.7


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_ridge_brings_the_output_closer_than_bias_and_bias_than_nothing(norm: str) -> None:
    data, held = texts(256), texts(64, seed=5)
    program = planned(analysed(Encoder(norm), data))
    errors = []
    for method in ("refit", "ridge", "bias", "none"):
        after = SliceAxes().run(recovered(program, data, method)[0])
        errors.append(
            sum(
                float((a - b).square().sum())
                for batch in held.batches
                for a, b in zip(
                    run_flat(after, flat(program, batch)), run_flat(program, flat(program, batch)), strict=True
                )
            )
        )
    assert errors[1:] == sorted(errors[1:])
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize("method", ["auto", "ridge", "bias", "none"])
def test_nothing_cut_leaves_the_weights_bit_identical(method: str) -> None:
    program = analysed(Encoder(), texts(16)).but(plan=CompressionPlan({}))
    after, report = recovered(program, texts(32), method)
    assert after is program
    assert report is None


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_is_a_combination_of_the_rest_is_recovered_exactly(norm: str) -> None:
    """Every second neuron repeats the one before: without it the layer can still say all it said."""
    model = Encoder(norm)
    with torch.no_grad():
        for layer in model.layers:
            layer.fc1.weight[1::2], layer.fc1.bias[1::2] = layer.fc1.weight[::2], layer.fc1.bias[::2]
    data = texts(96)
    program = analysed(model, data)
    neurons = {
        g.name: Choice(str(g.kind), g.size, tuple(range(0, g.size, 2)))
        for g in program.need("groups")
        if g.kind is Kind.FFN
    }
    assert len(neurons) == 2
    program = program.but(plan=CompressionPlan(neurons))
    batch = flat(program, texts(16, seed=3).batches[0])
    dense = run_flat(program, batch)
    before, after = (
        relative_error(run_flat(SliceAxes().run(p), batch), dense)
        for p in (program, recovered(program, data, rel=1e-9)[0])
    )
    assert before > 0.05
    assert after < 1e-4


def test_convolutions_recover_what_is_repeated() -> None:
    model = ResidualConvolutions()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model.a.weight[8:], model.a.bias[8:] = model.a.weight[:8], model.a.bias[:8]
        model.norm.weight.copy_(torch.linspace(-4, 4, 8))
    data = floats(8, 3, 16, 16)
    program = analysed(model, data)
    group = next(g for g in program.need("groups") if g.prunable and g.size == 16)
    program = program.but(plan=CompressionPlan({group.name: Choice(str(group.kind), 16, tuple(range(8)))}))
    batch = flat(program, floats(4, 3, 16, 16, batches=1).batches[0])
    after, report = recovered(program, data, rel=1e-9)
    assert [s.node for s in report.steps] == ["conv2d_2"]
    assert relative_error(run_flat(SliceAxes().run(program), batch), run_flat(program, batch)) > 0.01
    assert relative_error(run_flat(SliceAxes().run(after), batch), run_flat(program, batch)) < 1e-4


def test_parallel_branches_share_one_target() -> None:
    data = floats(32, 5, 12)
    program = planned(analysed(Parallel(), data))
    sites, _ = sites_of(program)
    assert len({s.target for s in sites}) == 1
    after, report = recovered(program, data)
    laws_hold(program, after, data)
    assert report.steps[1].after < report.steps[1].before


def test_what_padding_holds_does_not_matter() -> None:
    data = texts(64)
    program = planned(analysed(Encoder(), data))
    other = Calibration(
        tuple(
            Batch(
                (), {**b.kwargs, "input_ids": torch.where(b.kwargs["attention_mask"].bool(), b.kwargs["input_ids"], 7)}
            )
            for b in data.batches
        ),
        "other padding",
    )
    one, two = (recovered(program, d)[0].tensors for d in (data, other))
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_an_emptied_branch_leaves_the_mean_in_the_bias() -> None:
    data = texts(64)
    program = analysed(Encoder(), data, allow_empty=True)
    groups = [g for g in program.need("groups") if g.kind is Kind.FFN]
    program = program.but(plan=CompressionPlan({groups[0].name: Choice("ffn", groups[0].size, ())}))
    after, report = recovered(program, data)
    assert len(report.steps) == 1
    assert report.steps[0].after < report.steps[0].before
    changed = [n for n, t in after.tensors.items() if not torch.equal(t, program.tensors[n])]
    assert changed == ["layers.0.fc2.bias"]
    laws_hold(program, after, texts(16, seed=9))


def test_without_a_bias_the_signature_stays() -> None:
    data = texts(64)
    program = planned(analysed(Encoder(bias=False), data))
    after, report = recovered(program, data)
    assert set(after.tensors) == set(program.tensors)
    assert all(s.after <= s.before for s in report.steps)
    assert recovered(program, data, "bias")[0].tensors.keys() == program.tensors.keys()


def test_a_layer_too_large_to_solve_moves_its_bias_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.passes.transform.recovery.closed_form.LARGEST", 9)
    data = texts(64)
    program = planned(analysed(Encoder(), data), 0.34)  # one head of 8 columns stays, and 11 neurons
    after, report = recovered(program, data)
    assert len(report.skipped) == 2
    assert all("its bias alone moved" in why for why in report.skipped.values())
    changed = {n for n, t in after.tensors.items() if not torch.equal(t, program.tensors[n])}
    assert {"layers.0.fc2.bias", "layers.0.o.weight", "layers.0.o.bias"} <= changed
    assert "layers.0.fc2.weight" not in changed


def test_the_same_data_give_the_same_weights_and_the_dense_program_stays() -> None:
    data = texts(64)
    program = planned(analysed(Encoder(depth=1), data))
    before = {n: t.clone() for n, t in program.tensors.items()}
    one, two = (recovered(program, data, "auto")[0].tensors for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(t, program.tensors[n]) for n, t in before.items())


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "name",
    [
        "transposed_weights",
        "shuffle",
        "depthwise",
        "tied",
        "group_norm",
        "gqa_repeat",
        "swin",
        "resnet50",
        "mixer",
        "bert",
        "llama",
    ],
)
def test_models_of_the_zoo(name: str) -> None:
    program = planned(laws.analysed(name))
    inputs = [zoo.other_inputs(*program.example_inputs, 8) for _ in range(3)]
    data = Calibration(tuple(Batch(tuple(args), kwargs) for args, kwargs in inputs), "zoo")
    after, report = recovered(program, data, "refit")
    laws.sliced_equals_masked(after, after.need("plan"), SliceAxes().run(after))
    assert report.steps
    assert all(s.after <= s.before * (1 + 1e-9) for s in report.steps)


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_named() -> None:
    with pytest.raises(OptionError, match="unknown recovery 'rigde'"):
        Recover(method="rigde")
    with pytest.raises(OptionError, match="rel must not be negative"):
        Recover(rel=-1)
    with pytest.raises(OptionError, match="between 0 and 1"):
        Recover(held_out=1.0)
    with pytest.raises(OptionError, match="unknown solver 'lsqr'"):
        Recover(method="scale", solver="lsqr")
    with pytest.raises(OptionError, match="unknown beyond 'go'"):
        Recover(method="scale", beyond="go")
    with pytest.raises(OptionError, match="recovery needs data"):
        Recover(method="ridge").run(planned(analysed(Encoder(), texts(16))))


# ---------------------------------------------------------------- a class token, scales


def test_the_read_position_is_found_and_weighted(trained: DigitsViT, digit_data: Digits) -> None:
    data = Calibration(tuple(Batch((x,)) for x in digit_data.train_images[:192].split(32)), "digits")
    program = planned(analysed(trained, data), 0.4)
    sites, _ = sites_of(program)
    assert [s.read for s in sites] == [None, None, None, 0]
    one, two = (recovered(program, data, readout=readout) for readout in (True, False))
    same, other = (
        [torch.equal(one[0].tensors[n], two[0].tensors[n]) for n in names]
        for names in ([s.parameter for s in one[1].steps[:-1]], [one[1].steps[-1].parameter])
    )
    assert all(same)
    assert not any(other)
    unseen = [digit_data.test_images]
    dense = run_flat(program, unseen)[0].log_softmax(1)
    far = [
        float(
            torch.nn.functional.kl_div(
                run_flat(SliceAxes().run(p), unseen)[0].log_softmax(1), dense, log_target=True, reduction="batchmean"
            )
        )
        for p in (one[0], two[0])
    ]
    assert far[0] < 1.02 * far[1]


def test_a_mean_over_tokens_or_an_output_of_all_reads_every_position() -> None:
    for model, data in ((Encoder(depth=1), texts(16)), (Parallel(), floats(4, 5, 12))):
        assert {s.read for s in sites_of(planned(analysed(model, data)))[0]} == {None}


@pytest.mark.parametrize("solver", ["ridge", "lsmr"])
def test_scales_out_of_range_skip_a_layer_or_stop_there(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = texts(64)
    program = planned(analysed(Encoder(depth=1), data))
    _, all_right = recovered(program, data, "scale", solver=solver)
    assert len(all_right.steps) == 2
    assert all(s.after <= s.before for s in all_right.steps)
    monkeypatch.setattr("fxprune.passes.transform.recovery.moments.SCALE_LIMIT", 0.5)
    skip, stop = (recovered(program, data, "scale", solver=solver, beyond=beyond)[1] for beyond in ("skip", "stop"))
    assert skip.steps == stop.steps == ()
    assert {why.partition(":")[0] for why in skip.skipped.values()} == {"its scales leave [-10, 10]"}
    assert [("nearly singular" in why, "left [-10, 10]" in why) for why in stop.skipped.values()] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("depth", [1, 3])
def test_every_prefix_runs_once_however_deep_the_model(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of each graph per closed form; the layers that are solved, and the path to their sum, again."""
    data = texts(160)
    program = planned(analysed(Encoder("pre", depth=depth), data))
    runs: Counter[tuple[Stream, str]] = Counter()
    run = Stream.run

    def counted(self: Stream, node: Node, override: Mapping[str, Any] | None = None) -> Any:
        if node.op == "call_function":
            runs[self, node.name] += 1
        return run(self, node, override)

    monkeypatch.setattr(Stream, "run", counted)
    nodes, batches = sum(n.op == "call_function" for n in program.graph.nodes), len(data.batches)
    sites = {name for s in sites_of(program, refit=True)[0] for name in (s.start, *s.path)}
    passes = {}
    for method in ("ridge", "refit", "auto"):
        runs.clear()
        recovered(program, data, method)
        passes[method] = sum(runs.values()) / nodes / batches
        assert {name for (_, name), count in runs.items() if count > 1} <= sites
        assert max(runs.values()) <= 3
    assert passes["ridge"] <= passes["refit"] <= 3
    assert passes["auto"] <= 15  # five candidates on four fifths of the samples, and the winner on all


@pytest.mark.parametrize("samples", [64, 96, 160])
def test_all_of_auto_takes_at_most_two_passes_per_layer(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits, and the outputs of dense graph and candidates on held-out samples and their copies: whatever runs a graph.

    One pass: each linear layer of the graph on each sample once. Layers: those that sum over a cut axis, two a block.
    """
    data = texts(samples)
    program = planned(analysed(Encoder("pre", depth=6), data))
    linear = torch.ops.aten.linear.default
    nodes = [n for n in program.graph.nodes if n.target is linear]
    rows = 0

    run, interpret = Stream.run, Interpreter.run_node

    def note(node: Node, value: Any) -> Any:
        nonlocal rows
        rows += len(value) if node.target is linear else 0
        return value

    def stream(self: Stream, node: Node, override: Mapping[str, Any] | None = None) -> Any:
        return note(node, run(self, node, override))

    monkeypatch.setattr(Stream, "run", stream)
    monkeypatch.setattr(Interpreter, "run_node", lambda self, node: note(node, interpret(self, node)))
    _, report = recovered(program, data, "auto")
    assert report.method != "none", "the winner is fitted again"
    assert 0 < rows / len(nodes) / samples <= 2 * len(sites_of(program)[0]) == 24
