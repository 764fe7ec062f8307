"""Inputs as people have them: arrays, dicts, one dict, wrappers that pass everything on, half precision, data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.strangers import PassesOn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxprune
from fxprune.data import load_data
from fxprune.data.held_out import hold_out
from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.testing import relative_error

IDS, MASK = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0)), torch.ones(2, 8)


class Text(nn.Module):
    """Ids and a mask by name, with defaults for neither or one."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.e(ids)
        return ((x + self.b(torch.relu(self.a(x)))) * mask[..., None]).sum(1)


class OneDict(nn.Module):
    """All inputs in one dict, as modules of sentence-transformers and of detection take them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Text()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"embedding": self.inner(features["ids"], features["mask"])}


def pictures(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 4)
    return nn.Sequential(*layers).to(dtype).eval()


@pytest.mark.parametrize(
    ("model", "given", "names"),
    [
        (Text, (IDS, MASK), ("ids", "mask")),
        (Text, [IDS.numpy(), MASK.numpy()], ("ids", "mask")),
        (Text, {"ids": IDS, "mask": MASK}, ("ids", "mask")),
        (Text, {"ids": IDS.numpy(), "mask": MASK.double().numpy()}, ("ids", "mask")),
        (Text, ((IDS,), {"mask": MASK}), ("ids", "mask")),
        (OneDict, {"ids": IDS, "mask": MASK}, ("ids", "mask")),
        (OneDict, ({"ids": IDS, "mask": MASK},), ("ids", "mask")),
        (OneDict, {"features": {"ids": IDS, "mask": MASK}}, ("ids", "mask")),
        (OneDict, "ids=2x8:int64,mask=2x8", ("ids", "mask")),
        (lambda: PassesOn(Text()), (IDS, MASK), ("ids", "mask")),
        (lambda: PassesOn(Text()), {"ids": IDS, "mask": MASK}, ("ids", "mask")),
        (lambda: PassesOn(PassesOn(Text())), "2x8:int64,2x8", ("ids", "mask")),
        (lambda: PassesOn(OneDict()), {"ids": IDS, "mask": MASK}, ("ids", "mask")),
    ],
)
def test_inputs_in_every_arrangement_are_cut_to_what_masking_gives(model: Any, given: Any, names: Any) -> None:
    """The result takes what the module takes, at another batch too; with data in the same arrangement."""
    module = model().eval()
    loaded = load(module, input=given)
    assert loaded.input_names == names
    small = fxprune.compile(module, given, flops=0.6)
    args, kwargs = loaded.fill([torch.cat([leaf, leaf[:1]]) for leaf in loaded.leaves])
    [keep] = [c.keep for c in small.plan.choices.values() if len(c.keep) < c.size]
    inner = next(m for m in module.modules() if isinstance(m, Text))
    gone = [i for i in range(128) if i not in keep]
    with torch.no_grad():
        inner.a.weight[gone], inner.a.bias[gone] = 0, 0
        expected, got = module(*args, **kwargs), small.module(*args, **kwargs)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        expected, got = expected["embedding"], got["embedding"]
    assert relative_error(expected, got) < 1e-5


def test_a_dict_model_takes_its_data_as_dicts_in_any_form() -> None:
    """(features, labels) of a loader, plain dicts, dicts of arrays: the same two batches."""
    loaded = load(OneDict().eval(), input={"ids": IDS, "mask": MASK})
    rows = [{"ids": IDS + i, "mask": MASK} for i in (0, 1)]
    labels = torch.tensor([0, 1])
    for source in (
        rows,
        [(row, labels) for row in rows],
        [{k: v.numpy() for k, v in row.items()} for row in rows],
        [{"features": row} for row in rows],
        [{**row, "labels": labels} for row in rows],
        {k: torch.cat([row[k] for row in rows]) for k in rows[0]},
    ):
        data = load_data(source, loaded, batch=2)
        assert [list(b.args[0]) for b in data.batches] == [["ids", "mask"]] * 2
        assert torch.equal(torch.cat([b.args[0]["ids"] for b in data.batches]), torch.cat([IDS, IDS + 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shapes_and_data_without_a_type_are_in_the_models_own(dtype: torch.dtype) -> None:
    loaded = load(pictures(dtype), input="2x3x8x8")
    assert loaded.args[0].dtype == dtype
    array = np.random.default_rng(0).normal(size=(4, 3, 8, 8))
    assert load(pictures(dtype), input=array).args[0].dtype == dtype
    assert load_data([array], loaded).batches[0].args[0].dtype == dtype


def test_a_file_may_hold_labels_beside_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=IDS.numpy(), mask=MASK.numpy(), labels=np.arange(2))
    assert load(Text(), input=str(tmp_path / "x.npz")).input_names == ("ids", "mask")


def test_inputs_in_no_arrangement_are_refused_with_what_the_model_says() -> None:
    with pytest.raises(LoadError) as caught:
        load(OneDict(), input={"ids": IDS, "masks": MASK})
    assert "mask" in (caught.value.why or "")
    with pytest.raises(LoadError, match="no input 'pixels'"):
        load(Text(), input="ids=2x8:int64,pixels=2x8")
    with pytest.raises(LoadError, match="type"):
        load(pictures(), input=np.array([["a", "b"]]))


# --- data sets ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        return iter([(torch.full((3, 8, 8), float(i)), i) for i in range(40)])


def test_a_data_set_is_samples_and_a_loader_batches() -> None:
    """Of a data set that is asked by number a seeded draw is taken, and others are held out; of a stream the first."""
    loaded = load(pictures(), input="2x3x8x8")
    rows = torch.arange(40.0)[:, None, None, None].expand(40, 3, 8, 8)
    numbered = TensorDataset(rows, torch.arange(40))
    taken = load_data(numbered, loaded, samples=16, batch=5)
    assert taken.labelled
    assert [b.size for b in taken.batches] == [5, 5, 5, 1]
    drawn = {int(n) for b in taken.batches for n in b.labels}  # type: ignore[union-attr]
    assert drawn != set(range(16))
    kept = hold_out(numbered, loaded, samples=16, seed=0, count=24)
    assert kept is not None
    assert {int(n) for b in kept.batches for n in b.labels} == set(range(40)) - drawn  # type: ignore[union-attr]
    for source in (Stream(), DataLoader(numbered, batch_size=16)):
        first = load_data(source, loaded, samples=16)
        assert sorted(int(n) for b in first.batches for n in b.labels) == list(range(16))  # type: ignore[union-attr]
        assert hold_out(source, loaded, samples=16, seed=0, count=8) is None


def test_samples_that_cannot_be_stacked_are_named() -> None:
    class Ragged(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)])

    with pytest.raises(LoadError, match="could not be iterated") as caught:
        load_data(Ragged(), load(pictures(), input="2x3x8x8"))
    assert "size" in (caught.value.why or "")
