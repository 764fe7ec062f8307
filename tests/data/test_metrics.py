"""Metrics against hand-made figures and scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxprune.data.metrics import choose, divergence, score
from fxprune.errors import OptionError

LOGITS = {"logits": torch.randn(6, 5)}


def test_labels_and_outputs_say_which_metric() -> None:
    hidden = {"last_hidden_state": torch.randn(6, 3, 8)}
    assert choose(LOGITS, torch.zeros(6, dtype=torch.long)) == ("top1", "logits")
    assert choose({**hidden, **LOGITS}, torch.zeros(6, dtype=torch.long)) == ("top1", "logits")
    assert choose(LOGITS, torch.zeros(6, dtype=torch.long), "f1") == ("f1", "logits")
    assert choose({"y": torch.randn(6, 1)}, torch.randn(6)) == ("spearman", "y")
    assert choose({"y": torch.randn(6, 4, 8, 8)}, torch.zeros(6, 16, 16, dtype=torch.long)) == ("miou", "y")
    assert choose({"y": torch.randn(6, 7, 4)}, torch.zeros(6, 7, dtype=torch.long)) == ("top1", "y")
    assert choose(LOGITS, None) == ("agreement", "logits")
    assert choose({"y": torch.randn(6)}, None) == ("spearman", "y")
    assert choose(hidden, None) == ("cosine", "last_hidden_state")
    assert choose(LOGITS, None, "cosine") == ("cosine", "logits")


@pytest.mark.parametrize(
    ("outputs", "labels", "wanted", "says"),
    [
        (LOGITS, None, "top1", "no labels"),
        (LOGITS, torch.zeros(6, dtype=torch.long), "agreement", "has labels"),
        (LOGITS, None, "top5", "known"),
        (LOGITS, torch.randn(6), "auto", "no metric fits"),
        (LOGITS, torch.zeros(6, dtype=torch.long), "miou", "no metric fits"),
        ({"ids": torch.zeros(6, dtype=torch.long)}, None, "auto", "no metric fits"),
    ],
)
def test_what_does_not_fit_is_an_error(
    outputs: dict[str, Tensor], labels: Tensor | None, wanted: str, says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        choose(outputs, labels, wanted)


def test_top1_counts_over_uneven_batches_and_skips_ignored_tokens() -> None:
    one, two = torch.eye(3), torch.eye(3)[:1]
    assert score("top1", [one, two], [torch.tensor([0, 1, 0]), torch.tensor([0])]) == 0.75
    tokens = torch.eye(3).unsqueeze(0)
    assert score("top1", [tokens], [torch.tensor([[0, -100, 1]])]) == 0.5


def test_f1_is_scikit_learns_macro_f1() -> None:
    learn = pytest.importorskip("sklearn.metrics")
    said, truth = torch.randint(0, 4, (50,)), torch.randint(0, 4, (50,))
    got = score("f1", [functional.one_hot(said, 4).float()], [truth])
    assert got == pytest.approx(learn.f1_score(truth, said, average="macro"))


def test_miou_is_scikit_learns_macro_jaccard_at_the_labels_size() -> None:
    learn = pytest.importorskip("sklearn.metrics")
    logits, truth = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    said = functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False).argmax(1)
    want = learn.jaccard_score(truth.flatten(), said.flatten(), average="macro")
    assert score("miou", [logits[:1], logits[1:]], [truth[:1], truth[1:]]) == pytest.approx(want)
    unknown = truth.clone()
    unknown[:, 0] = 255
    want = learn.jaccard_score(truth[:, 1:].flatten(), said[:, 1:].flatten(), average="macro")
    assert score("miou", [logits], [unknown]) == pytest.approx(want)


def test_accuracy_cannot_fall_by_more_than_what_disagrees() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        dense, small = torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator)
        labels = torch.randint(0, 3, (40,), generator=generator)
        drop = score("top1", [dense], [labels]) - score("top1", [small], [labels])
        assert drop <= 1 - score("agreement", [small], [dense]) + 1e-12


def test_divergence_is_torchs() -> None:
    one, two = torch.randn(7, 5), torch.randn(7, 5)
    want = functional.kl_div(one.log_softmax(-1), two.log_softmax(-1), reduction="batchmean", log_target=True)
    assert divergence([one[:3], one[3:]], [two[:3], two[3:]]) == pytest.approx(float(want), rel=1e-5)
    assert divergence([one], [one]) == 0.0


def test_rank_correlation_and_cosine() -> None:
    x = torch.randn(9)
    assert score("spearman", [x[:4], x[4:]], [x[:4].exp(), x[4:].exp()]) == pytest.approx(1.0)
    assert score("cosine", [x.view(3, 3)], [-2 * x.view(3, 3)]) == pytest.approx(-1.0)
