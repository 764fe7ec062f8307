"""Models that are built by their name, built in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.cli.entry import OK, main
from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.intake.model_args import read_model_args
from fxprune.process.libraries import survive_torchvision


def refused(source: Any, said: str, **more: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(source, model_args=said, **more)
    return caught.value


@pytest.fixture
def timm() -> Any:
    survive_torchvision()
    return pytest.importorskip("timm")


@pytest.mark.parametrize("said", ["img_size", "img_size=", "=3", "a=1,a=2", "a b=1", ""])
def test_text_of_another_form_is_refused(said: str) -> None:
    with pytest.raises(LoadError, match="not understood") as caught:
        read_model_args(said)
    assert "img_size=384" in caught.value.cure


def test_timm_is_built_in_another_size_with_its_own_inputs(timm: Any) -> None:
    loaded = load("timm:test_vit", model_args="img_size=96x64,in_chans=1,num_classes=0")
    assert loaded.args[0].shape == (2, 1, 96, 64)
    assert loaded.image is not None
    assert loaded.image.size == (1, 96, 64)
    assert loaded.model(*loaded.args).shape == (2, 64), "features, no classes"
    assert load("timm:test_vit", model_args={"img_size": 96}).args[0].shape == (2, 3, 96, 96)


def test_a_checkpoint_without_the_classifier_that_was_not_asked_for(timm: Any, tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet", num_classes=7)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    loaded = load("timm:test_resnet", checkpoint=tmp_path / "w.safetensors", model_args="num_classes=0")
    assert isinstance(loaded.model, nn.Module)
    x = torch.randn(2, 3, 64, 64)
    whole.reset_classifier(0)
    assert torch.equal(loaded.model(x), whole.eval()(x))
    assert any("fc.weight" in note for note in loaded.notes)
    assert load("timm:test_resnet", checkpoint=tmp_path / "w.safetensors").model(x).shape == (2, 7)  # type: ignore[operator]


def test_arguments_that_timm_does_not_take_are_its_own_error(timm: Any) -> None:
    error = refused("timm:test_resnet", "heads_per_side=3")
    assert "heads_per_side" in error.why
    assert "--model-args" in error.cure or "model_args" in error.cure


def test_a_folder_takes_entries_of_its_config(tmp_path: Path) -> None:
    survive_torchvision()
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=30, **size)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert load(tmp_path, model_args="num_labels=2,hidden_act=relu").model.config.hidden_act == "relu"  # type: ignore[union-attr]
    assert "hidden_act" in refused(tmp_path, "hiden_act=relu").cure
    for foreign in ("auto_map=x", "_attn_implementation=eager", "to_dict=1"):
        assert "no entry" in refused(tmp_path, foreign).what


def test_what_is_built_already_takes_none(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    torch.save(model, tmp_path / "m.pt")
    for source in (model, tmp_path / "m.pt"):
        assert "built already" in refused(source, "num_classes=0", input="1x3").what


def test_the_command_line_builds_it(timm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm:test_vit", "--model-args", "img_size=64,num_classes=3", "--quiet", "--json"]) == OK
    assert '"params"' in capsys.readouterr().out
