"""Recovery: the closed forms, where they apply, what they must never do, and that slicing stays masking."""

from __future__ import annotations

from typing import Any

import laws
import pytest
import torch
import zoo
from blocks import Encoder, Parallel, ResidualConvolutions
from torch import Tensor, nn

from fxprune.axis import Keep
from fxprune.capture import capture
from fxprune.data import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.group import DEFAULT_KINDS, Kind
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.agreement import Yardstick, spearman
from fxprune.passes.transform.recovery.choose import split
from fxprune.passes.transform.recovery.moments import Moments
from fxprune.passes.transform.recovery.sites import Site, find_sites
from fxprune.passes.transform.recovery.views import noisy
from fxprune.passes.transform.resize import resize
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.pipeline import Pipeline
from fxprune.plan import Choice, CompressionPlan
from fxprune.program import Program
from fxprune.testing import keep_of, relative_error, run_flat

START = ("axes", "groups", "plan")


def texts(count: int, batch: int = 16, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(0, count, batch):
        ids = torch.randint(1, 50, (batch, 7), generator=generator)
        mask = (torch.arange(7) < torch.randint(3, 8, (batch, 1), generator=generator)).long()
        batches.append(Batch((), {"input_ids": ids * mask, "attention_mask": mask}))
    return Calibration(tuple(batches), "random ids")


def floats(*shape: int, batches: int = 4) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(tuple(Batch((torch.randn(shape, generator=generator),)) for _ in range(batches)), "normal")


def analysed(model: nn.Module, data: Calibration, **options: Any) -> Program:
    batch = data.batches[0]
    passes = (Clean(), Inline(), PropagateAxes(), FindGroups(**{"align": 1, "floor": 0.0, **options}))
    return Pipeline(passes).run(capture(model.eval(), batch.args, dict(batch.kwargs)))


def planned(program: Program, share: float = 0.5, seed: int = 0) -> Program:
    return program.but(plan=laws.random_plan(program, DEFAULT_KINDS, share, seed))


def recovered(program: Program, data: Calibration, method: str = "ridge", **options: Any) -> tuple[Program, Any]:
    one = Recover(method=method, data=data, **options)
    return Pipeline((one,), start=START).run(program), (one.results[0] if one.results else None)


def flat(program: Program, batch: Batch) -> list[Any]:
    return program.flatten(batch.args, batch.kwargs)


def sites_of(program: Program, refit: bool = False) -> tuple[list[Site], dict[str, str]]:
    keep: Keep = keep_of(program, program.need("plan"))
    found = find_sites(program, keep, resize(program, keep).graph, refit)
    return list(found.sites), dict(found.skipped)


# ---------------------------------------------------------------- closed forms


def moments(c: Tensor, r: Tensor, w: Tensor, pieces: int = 1) -> Moments:
    made = Moments()
    for part in zip(c.chunk(pieces), r.chunk(pieces), w.chunk(pieces), strict=True):
        made.add(*part)
    return made


def rows(n: int = 60, k: int = 5, o: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, k) + 3, torch.randn(n, o) - 2, torch.rand(n)


def test_hand_example() -> None:
    """methods 11.8: G = [[2, 1], [1, 2]], W = [3, 4], column 1 goes: w0 becomes 5 and 24 of squared error stay."""
    root = torch.linalg.cholesky(torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)).T
    kept, gone = root[:, :1], root[:, 1:]
    system = moments(kept, 4 * gone, torch.ones(2)).finish(centred=False)
    change = system.ridge(0.0)
    assert 3 + float(change) == pytest.approx(5)
    assert 2 * system.error(change) == pytest.approx(24)


def test_moments_do_not_depend_on_the_batching_and_centre_without_cancelling() -> None:
    c, r, w = rows()
    c, r = c + 1000, r - 500
    one, many = moments(c, r, w).finish(True), moments(c, r, w, 7).finish(True)
    assert torch.allclose(one.g, many.g, rtol=1e-4)
    weight = (w / w.sum()).double()[:, None]
    centred, gap = (x.double() - (x.double() * weight).sum(0) for x in (c, r))
    assert torch.allclose(many.g, centred.T @ (centred * weight), rtol=1e-4)
    assert torch.allclose(many.b, centred.T @ (gap * weight), rtol=1e-3, atol=1e-5)


def test_weights_of_zero_do_not_count() -> None:
    c, r, w = rows()
    w[::2] = 0
    one, two = moments(c, r, w).finish(True), moments(c[1::2], r[1::2], w[1::2]).finish(True)
    assert torch.equal(one.g, two.g)
    assert moments(c, r, w).rows == 30


@pytest.mark.parametrize("rel", [0.0, 0.01, 0.5, 5.0])
def test_ridge_is_never_worse_than_bias_nor_bias_than_nothing(rel: float) -> None:
    system = moments(*rows()).finish(True)
    change = system.ridge(rel)
    errors = [system.error(change, system.bias(change)), system.error(None, system.bias()), system.error()]
    assert errors == sorted(errors)
    about_zero = moments(*rows()).finish(False)
    assert about_zero.error(about_zero.ridge(rel)) <= about_zero.error()


def test_the_bias_needs_no_products() -> None:
    for centred in (True, False):
        one, two = (moments_of(products).finish(centred) for products in (True, False))
        assert torch.allclose(one.bias(), two.bias())
        assert one.error() == pytest.approx(two.error())
        assert one.error(None, one.bias()) == pytest.approx(two.error(None, two.bias()))
        assert not two.g.numel()


def moments_of(products: bool) -> Moments:
    torch.manual_seed(1)
    made = Moments(products)
    made.add(*rows())
    return made


def test_error_is_that_of_the_rows() -> None:
    c, r, w = rows()
    system = moments(c, r, w).finish(True)
    change, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    left = r.double() - c.double() @ change.T - bias
    assert system.error(change, bias) == pytest.approx(float((left.square().sum(1) * w).sum() / w.sum()), rel=1e-5)


def test_scales_are_found() -> None:
    """methods 11.7: a known factor per unit comes back."""
    weight, factor = torch.randn(4, 6), torch.tensor([1.2, 0.8, 1.0])
    unit = torch.tensor([0, 0, 1, 1, 2, 2])
    c = torch.randn(50, 6)
    gap = c @ (weight * (factor[unit] - 1)).T
    change = moments(c, gap, torch.ones(50)).finish(True).scale(weight, unit, 1e-9)
    assert torch.allclose((weight + change) / weight, factor[unit].double().expand(4, 6), atol=1e-4)
    wild = moments(c, 1000 * gap, torch.ones(50)).finish(True).scale(weight, unit, 1e-9)
    assert wild is None  # scales beyond +-10: the layer stays


def test_a_silent_input_changes_nothing() -> None:
    assert not moments(torch.zeros(9, 2), torch.randn(9, 3), torch.ones(9)).finish(True).ridge(0.1).any()


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


def laws_hold(program: Program, after: Program, data: Calibration) -> None:
    """Sliced equals masked with the new weights, and cut entries keep their old ones."""
    small = SliceAxes().run(after)
    from fxprune.testing import masked_run

    inputs = flat(program, data.batches[0])
    assert relative_error(run_flat(small, inputs), masked_run(after, after.need("plan"), inputs)) < 1e-4


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
        errors.append(sum(float((a - b).square().sum()) for batch in held.batches for a, b in zip(
            run_flat(after, flat(program, batch)), run_flat(program, flat(program, batch)), strict=True)))
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
    neurons = {g.name: Choice(str(g.kind), g.size, tuple(range(0, g.size, 2)))
               for g in program.need("groups") if g.kind is Kind.FFN}
    assert len(neurons) == 2
    program = program.but(plan=CompressionPlan(neurons))
    batch = flat(program, texts(16, seed=3).batches[0])
    dense = run_flat(program, batch)
    before, after = (relative_error(run_flat(SliceAxes().run(p), batch), dense)
                     for p in (program, recovered(program, data, rel=1e-9)[0]))
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
    other = Calibration(tuple(Batch((), {**b.kwargs, "input_ids": torch.where(
        b.kwargs["attention_mask"].bool(), b.kwargs["input_ids"], 7)}) for b in data.batches), "other padding")
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
    program = planned(analysed(Encoder(), data))
    before = {n: t.clone() for n, t in program.tensors.items()}
    one, two = (recovered(program, data, "auto")[0].tensors for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(t, program.tensors[n]) for n, t in before.items())


@pytest.mark.parametrize("name", ["transposed_weights", "shuffle", "depthwise", "tied", "group_norm", "gqa_repeat",
                                  "swin", "resnet50", "mixer", "bert", "llama"])
def test_models_of_the_zoo(name: str) -> None:
    program = planned(laws.analysed(name))
    inputs = [zoo.other_inputs(*program.example_inputs, 8) for _ in range(3)]
    data = Calibration(tuple(Batch(tuple(args), kwargs) for args, kwargs in inputs), "zoo")
    after, report = recovered(program, data, "refit")
    laws.sliced_equals_masked(after, after.need("plan"), SliceAxes().run(after))
    assert report.steps
    assert all(s.after <= s.before * (1 + 1e-9) for s in report.steps)


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_auto_is_never_worse_than_none_on_its_yardstick(norm: str) -> None:
    data = texts(160)
    program = planned(analysed(Encoder(norm), data), 0.4)
    after, report = recovered(program, data, "auto")
    assert set(report.guard) == {"none", "bias", "ridge", "refit"}
    kept = report.guard[report.method]
    assert kept["mixed"] >= report.guard["none"]["mixed"]
    assert kept["copies"] >= report.guard["none"]["copies"] - 0.0021
    _, held = split(program, data, 0.2)
    assert sum(b.size for b in held) == report.held_out == 32
    again = Yardstick(program, held, 0).measure(SliceAxes().run(after)).record()
    assert again == pytest.approx(dict(kept), abs=1e-3)
    assert report.asked == "auto"
    assert any("recovery" in note for note in after.notes)


def test_too_little_data_to_judge_means_none() -> None:
    program = planned(analysed(Encoder(), texts(16)))
    after, report = recovered(program, texts(2, batch=2), "auto")
    assert report.method == "none"
    assert "too few samples" in report.skipped[""]
    assert all(after.tensors[n] is t for n, t in program.tensors.items())


def test_a_single_batch_is_split_by_samples() -> None:
    program = analysed(Encoder(), texts(16))
    fit, held = split(program, texts(20, batch=20), 0.25)
    assert ([b.size for b in fit], [b.size for b in held]) == ([15], [5])
    assert torch.equal(torch.cat([fit[0].kwargs["input_ids"], held[0].kwargs["input_ids"]]),
                       texts(20, batch=20).batches[0].kwargs["input_ids"])


def test_agreement_is_perfect_with_itself_and_falls_with_damage() -> None:
    program = analysed(Encoder(), texts(16))
    ruler = Yardstick(program, texts(64).batches, 0)
    same = ruler.measure(program)
    assert (same.mixed, same.copies, same.cosine) == pytest.approx((1, 1, 1))
    worse = ruler.measure(SliceAxes().run(planned(program, 0.3)))
    assert worse.mixed < 0.999
    assert worse.cosine < 0.999


def test_noise_keeps_ends_and_padding() -> None:
    program = analysed(Encoder(), texts(16))
    batch = texts(64, batch=64).batches[0]
    changed = noisy(program, batch, torch.Generator().manual_seed(0))
    ids, now, mask = batch.kwargs["input_ids"], changed.kwargs["input_ids"], batch.kwargs["attention_mask"]
    assert torch.equal(now * (1 - mask), ids * (1 - mask))
    assert torch.equal(now[:, 0], ids[:, 0])
    last = mask.sum(1, keepdim=True) - 1
    assert torch.equal(now.gather(1, last), ids.gather(1, last))
    assert 0.05 < float((now != ids).float().mean()) < 0.5
    assert torch.equal(changed.kwargs["attention_mask"], mask)


def test_spearman_knows_ties() -> None:
    scipy = pytest.importorskip("scipy.stats")
    a, b = torch.randint(0, 5, (40,)).double(), torch.randn(40).double()
    assert spearman(a, b) == pytest.approx(float(scipy.spearmanr(a, b).statistic))
    assert spearman(torch.ones(5), b[:5]) == 0


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_named() -> None:
    with pytest.raises(OptionError, match="unknown recovery 'rigde'"):
        Recover(method="rigde")
    with pytest.raises(OptionError, match="rel must not be negative"):
        Recover(rel=-1)
    with pytest.raises(OptionError, match="between 0 and 1"):
        Recover(held_out=1.0)
    with pytest.raises(OptionError, match="recovery needs data"):
        Recover(method="ridge").run(planned(analysed(Encoder(), texts(16))))
