"""Calibration data of every kind arrives as the model takes it, or an error says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.data.batch import Batch, Calibration
from fxprune.data.sources import example_from, generate, load_data
from fxprune.errors import LoadError
from fxprune.intake.load import Loaded, load
from fxprune.process.libraries import survive_torchvision


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.table(input_ids) * attention_mask[..., None]).mean(1)


@pytest.fixture
def pictures() -> Loaded:
    return load(Pictures(), input="1x3x8x8")


@pytest.fixture
def ids() -> Loaded:
    return load(Ids(), input="input_ids=1x6:int64,attention_mask=1x6:int64")


def failure(spec: Any, loaded: Loaded, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load_data(spec, loaded, **options)
    return caught.value


def runs(loaded: Loaded, data: Calibration) -> None:
    """Every batch goes through the model as it is."""
    assert isinstance(loaded.model, nn.Module)
    for batch in data.batches:
        loaded.model(*batch.args, **batch.kwargs)


# --- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("whatever", "target")])
def test_tensor_files_with_labels(suffix: str, names: tuple[str, str], pictures: Loaded, tmp_path: Path) -> None:
    x, y = torch.randn(10, 3, 8, 8), torch.arange(10)
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, **{names[0]: x.numpy(), names[1]: y.numpy()})
    elif suffix == ".pt":
        torch.save({names[0]: x, names[1]: y}, path)
    else:
        save_file({names[0]: x, names[1]: y}, path)
    data = load_data(path, pictures, batch=4)
    assert [b.size for b in data.batches] == [4, 4, 2]
    assert data.samples == 10
    assert data.labelled
    assert not data.generated
    assert torch.equal(torch.cat([b.args[0] for b in data.batches]), x)
    assert torch.equal(torch.cat([b.labels for b in data.batches if b.labels is not None]), y)
    runs(pictures, data)


def test_fewer_samples_are_a_seeded_choice(pictures: Loaded, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype("f4"), y=np.arange(40))
    chosen = [load_data(tmp_path / "d.npz", pictures, samples=8, seed=s).batches[0].labels for s in (0, 0, 1)]
    assert chosen[0] is not None
    assert torch.equal(chosen[0], chosen[1])  # type: ignore[arg-type]
    assert not torch.equal(chosen[0], chosen[2])  # type: ignore[arg-type]
    assert chosen[0].shape == (8,)


def test_doubles_become_floats_and_labels_are_optional(pictures: Loaded, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", np.zeros((3, 3, 8, 8)))
    data = load_data(tmp_path / "d.npz", pictures)
    assert data.batches[0].args[0].dtype is torch.float32
    assert not data.labelled


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_bytes_of_pictures_are_normalised(layout: str, pictures: Loaded, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "d.npz", images=pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2), label=np.zeros(5, int)
    )
    got = load_data(tmp_path / "d.npz", pictures).batches[0].args[0]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype("f4")
    torch.testing.assert_close(got, torch.from_numpy(expected))


def test_a_missing_mask_is_ones_in_the_shape_of_the_ids(ids: Loaded, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.ones((4, 9), dtype=np.int64), labels=np.zeros((4, 1), dtype=np.int64))
    batch = load_data(tmp_path / "d.npz", ids).batches[0]
    assert torch.equal(batch.kwargs["attention_mask"], torch.ones(4, 9, dtype=torch.int64))
    assert batch.labels is not None
    assert batch.labels.shape == (4,)
    runs(ids, load_data(tmp_path / "d.npz", ids))


@pytest.mark.parametrize(
    ("arrays", "says", "detail"),
    [
        ({"x": np.zeros((0, 3, 8, 8), "f4")}, "empty", ""),
        ({"y": np.zeros(3)}, "empty", ""),
        ({"x": np.zeros((4, 3, 9, 8), "f4")}, "wrong shape", "[batch, 3, 8, 8]"),
        ({"x": np.zeros((4, 8, 8, 3), "f4")}, "wrong shape", "[4, 8, 8, 3]"),
        ({"x": np.zeros((4, 3, 8, 8), "i8")}, "wrong type", "torch.int64"),
        ({"x": np.zeros((4, 9, 9, 3), "u1")}, "another size", "8x8 pixels"),
        ({"x": np.full((4, 3, 8, 8), np.nan, "f4")}, "NaN", "samples 0, 1, 2, 3"),
        ({"x": np.zeros((4, 3, 8, 8), "f4"), "y": np.zeros(3)}, "different numbers", "labels has 3"),
        ({"x": np.zeros((4, 3, 8, 8), "f4"), "y": np.full(4, np.inf)}, "NaN", ""),
        ({"a": np.zeros((4, 3)), "b": np.zeros((4, 3))}, "does not say which", "a, b"),
        ({"x": np.zeros((4, 3, 8, 8), "c8")}, "wrong type", ""),
        ({"x": np.array(["text"])}, "none that torch knows", "<U4"),
    ],
)
def test_data_that_does_not_fit(
    arrays: dict[str, Any], says: str, detail: str, pictures: Loaded, tmp_path: Path
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    error = failure(tmp_path / "d.npz", pictures)
    assert says in error.what
    assert detail in error.why
    assert "d.npz" in error.where


def test_objects_in_arrays_are_not_unpickled(pictures: Loaded, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "Python objects" in failure(tmp_path / "d.npz", pictures).what


def test_swapped_channels_are_recognised(pictures: Loaded, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 8, 8, 3), "f4"))
    assert "channels second" in failure(tmp_path / "d.npz", pictures).cure


def test_a_lying_header_does_not_take_the_memory(pictures: Loaded, tmp_path: Path) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 16)
    assert "shorter than its header" in failure(tmp_path / "d.npz", pictures).what


# --- pictures -----------------------------------------------------------------------------------------------------


def paint(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_a_folder_of_classes_gives_pictures_and_labels(pictures: Loaded, tmp_path: Path) -> None:
    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        for i in range(3):
            paint(tmp_path / name / f"{i}.png", color, (20 + i, 10))
    data = load_data(tmp_path, pictures, batch=4)
    labels = torch.cat([b.labels for b in data.batches if b.labels is not None])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = data.batches[0].args[0]
    assert first.shape == (4, 3, 8, 8)
    torch.testing.assert_close(first[0, :, 0, 0], (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406]))
                               / torch.tensor([0.229, 0.224, 0.225]))  # fmt: skip
    assert "assumed" in data.origin
    runs(pictures, data)


def test_loose_and_grey_pictures_have_no_labels(pictures: Loaded, tmp_path: Path) -> None:
    Image.new("L", (9, 30), 7).save(tmp_path / "a.png")
    paint(tmp_path / "b.jpg", (1, 2, 3))
    data = load_data(tmp_path, pictures)
    assert (data.samples, data.labelled) == (2, False)


def test_bad_picture_folders(pictures: Loaded, ids: Loaded, tmp_path: Path) -> None:
    assert "no pictures" in failure(tmp_path, pictures).what
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    error = failure(tmp_path, pictures)
    assert "cannot be read" in error.what
    assert "a.png" in error.where
    assert "takes no pictures" in failure(tmp_path, ids).what


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    survive_torchvision()
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=len(words),
        max_position_embeddings=16, num_labels=2, label2id={"neg": 0, "pos": 1}, id2label={0: "neg", 1: "pos"},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("d.csv", "text,label\na good film,1\nbad,0\n", [1, 0]),
        ("d.csv", "Label,Sentence\npos,a good film\nneg,bad\n", [1, 0]),
        ("d.csv", "a good film,1\nbad,0\n", [1, 0]),
        ("d.csv", "a good film,0.5\nbad,1.25\n", [0.5, 1.25]),
        ("d.tsv", "sentence\tlabel\na good film\t1\nbad\t0\n", [1, 0]),
        ("d.csv", '"a good, film"\nbad\n', None),
        ("d.csv", "text;label\na good, very good film;1\nbad;0\n", [1, 0]),
        ("d.csv", "a good film;1\nbad;0\n", [1, 0]),
        ("d.csv", "label\ttext\n1\ta good film\n0\tbad\n", [1, 0]),
        ("d.csv", "a good; film\nbad\n", None),
        ("d.txt", "a good film\n\nbad\n", None),
        ("d.jsonl", '{"text": "a good film", "label": 1}\n{"text": "bad", "label": 0}\n', [1, 0]),
        ("d.jsonl", '{"text": "a good film", "label": "pos"}\n{"text": "bad", "label": "neg"}\n', [1, 0]),
        ("d.jsonl", '"a good film"\n"bad"\n', None),
    ],
)
def test_texts_with_the_folders_tokenizer(
    name: str, text: str, labels: list[int] | None, bert: Loaded, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    data = load_data(tmp_path / name, bert)
    batch = data.batches[0]
    assert set(batch.kwargs) == set(bert.input_names) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch.kwargs["attention_mask"][1].tolist()[:4] == [1, 1, 1, 0], "padded to the longest"
    assert (None if batch.labels is None else batch.labels.tolist()) == labels
    runs(bert, data)


def test_sentence_pairs_and_truncation(bert: Loaded, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"sentence1,sentence2,label\ngood film,{'very ' * 50},1\nbad,bad,0\n")
    batch = load_data(tmp_path / "d.csv", bert).batches[0]
    assert batch.kwargs["input_ids"].shape == (2, 16), "no longer than the model's positions"
    assert batch.kwargs["token_type_ids"].max() == 1


def test_sentence_pairs_without_a_header(bert: Loaded, tmp_path: Path) -> None:
    """The STS benchmark as it is distributed: two texts and a similarity."""
    (tmp_path / "d.csv").write_text('"a good, film",bad film,4.5\nfilm,1984,0\n')
    batch = load_data(tmp_path / "d.csv", bert).batches[0]
    assert batch.kwargs["token_type_ids"].max() == 1
    assert batch.labels is not None
    assert batch.labels.tolist() == [4.5, 0.0]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("d.csv", b"", "empty"),
        ("d.txt", b"\n\n", "no texts"),
        ("d.csv", b"text,label\n", "no texts"),
        ("d.csv", b"id,label\n1,2\n", "no text column"),
        ("d.csv", b"a,b,c\n1,2,3\n", "no text column"),
        ("d.csv", b"one,two,three\nfour,five,six\n", "no text column"),
        ("d.csv", b"tweet,sentiment\na good film,pos\n", "no text column"),
        ("d.csv", b"tweet;sentiment\na good film;pos\n", "no text column"),
        ("d.csv", b"one,1\ntwo, or three,2\n", "different numbers of columns"),
        ("d.csv", b"text,label\none\n", "number of columns"),
        ("d.jsonl", b"{nonsense\n", "not JSON"),
        ("d.jsonl", b"[1, 2]\n", "no JSON object"),
        ("d.jsonl", b'{"a": 1}\n', "names no texts"),
        ("d.jsonl", b'{"text": "a"}\n{"text": null}\n', "lacks its text"),
        ("d.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("d.h5", b"x", "no kind of data file"),
    ],
)
def test_bad_texts(name: str, data: bytes, says: str, bert: Loaded, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert says in failure(tmp_path / name, bert).what


def test_texts_need_a_tokenizer(ids: Loaded, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("hello")
    assert "tokenizer" in failure(tmp_path / "d.txt", ids).what


# --- Python -------------------------------------------------------------------------------------------------------


def test_loaders_and_iterables(pictures: Loaded) -> None:
    x, y = torch.randn(10, 3, 8, 8), torch.arange(10)
    sources: list[Any] = [
        DataLoader(TensorDataset(x, y), batch_size=4),
        [(x[:4], y[:4]), [x[4:], y[4:]]],
        [{"x": x, "label": y}],
        ({"images": part, "target": y[i : i + 5]} for i, part in ((0, x[:5]), (5, x[5:]))),
        [Batch((x,), {}, y)],
        {"x": x, "y": y},
    ]
    for source in sources:
        data = load_data(source, pictures, samples=7)
        assert data.samples == 7
        assert data.labelled
        assert torch.equal(torch.cat([b.args[0] for b in data.batches]), x[:7]) or isinstance(source, dict)
        runs(pictures, data)
    assert not load_data([x], pictures).labelled
    assert not load_data(x, pictures).labelled


def test_a_shuffling_loader_is_seeded(pictures: Loaded) -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 3, 8, 8), torch.arange(10)), batch_size=10, shuffle=True)
    state = torch.random.get_rng_state()
    first, second = (load_data(loader, pictures).batches[0].labels for _ in range(2))
    assert torch.equal(first, second)  # type: ignore[arg-type]
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is untouched"


def test_an_endless_iterable_ends(pictures: Loaded) -> None:
    def forever() -> Iterator[Tensor]:
        while True:
            yield torch.randn(4, 3, 8, 8)

    assert load_data(forever(), pictures, samples=10).samples == 10


def test_a_calibration_is_itself(pictures: Loaded) -> None:
    data = Calibration((Batch((torch.randn(2, 3, 8, 8),)),), "mine")
    assert load_data(data, pictures) is data
    assert "empty" in failure(Calibration((), "none"), pictures).what


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "empty"),
        (["text"], "not understood"),
        ([(torch.zeros(2, 3, 8, 8),) * 3], "number of inputs"),
        ([{"x": "no tensor"}], "no tensor"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(3))], "differ in number"),
        (3, "no data"),
        (nn.Linear(2, 2), "no data"),
    ],
)
def test_bad_iterables(source: Any, says: str, pictures: Loaded) -> None:
    assert says in failure(source, pictures).what


def test_a_failing_iterable_keeps_its_cause(pictures: Loaded) -> None:
    def breaks() -> Iterator[Tensor]:
        yield torch.zeros(1, 3, 8, 8)
        raise KeyError("disk")

    error = failure(breaks(), pictures)
    assert "KeyError" in error.why
    assert isinstance(error.__cause__, KeyError)


def test_python_functions(pictures: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_fxprune_data.py").write_text(
        "import torch\ndef batches():\n    return [torch.zeros(2, 3, 8, 8)]\ndef nothing():\n    return None\n"
    )
    assert load_data("python:my_fxprune_data:batches", pictures).samples == 2
    assert "no batches" in failure("python:my_fxprune_data:nothing", pictures).what
    assert "AttributeError" in failure("python:my_fxprune_data:gone", pictures).why
    assert "ModuleNotFoundError" in failure("python:my_gone_module:f", pictures).why
    assert "not understood" in failure("python:os.path", pictures).what
    assert str(tmp_path) not in __import__("sys").path


def test_missing_data_and_bad_counts(pictures: Loaded, tmp_path: Path) -> None:
    assert "no such" in failure(tmp_path / "gone", pictures).what
    assert "no such file" in failure(tmp_path / "gone.npz", pictures).what
    assert "at least 1" in failure(tmp_path, pictures, samples=0).what
    assert "at least 1" in failure(tmp_path, pictures, batch=-1).what


def test_data_gives_example_inputs_to_a_model_that_has_none(tmp_path: Path) -> None:
    loaded = load(Ids(), need_inputs=False)
    np.savez(
        tmp_path / "d.npz", input_ids=np.ones((4, 9), np.int64), attention_mask=np.ones((4, 9), np.int64), y=np.ones(4)
    )
    data = load_data(tmp_path / "d.npz", loaded)
    args, kwargs = example_from(data)
    assert args == ()
    assert {k: v.shape for k, v in kwargs.items()} == {"input_ids": (2, 9), "attention_mask": (2, 9)}
    runs(loaded, data)


# --- generated ----------------------------------------------------------------------------------------------------


def test_generated_inputs_look_like_the_example_and_say_so(ids: Loaded, pictures: Loaded) -> None:
    data = generate(ids, samples=70, seed=3)
    assert data.generated
    assert "generated" in data.origin
    assert data.samples == 70
    assert not data.labelled
    values = torch.cat([b.kwargs["input_ids"] for b in data.batches])
    assert (int(values.min()), int(values.max())) == (0, 49), "the whole vocabulary"
    assert bool(torch.cat([b.kwargs["attention_mask"] for b in data.batches]).all())
    assert torch.equal(generate(ids, 70, 3).batches[1].kwargs["input_ids"], data.batches[1].kwargs["input_ids"])
    assert not torch.equal(generate(ids, 70, 4).batches[1].kwargs["input_ids"], data.batches[1].kwargs["input_ids"])
    runs(ids, data)
    pixels = generate(((torch.randn(2, 3, 8, 8),), {}), samples=200).batches
    assert abs(float(torch.cat([b.args[0] for b in pixels]).std()) - 1) < 0.05
    with pytest.raises(LoadError, match="cannot be made up"):
        generate(((), {}))


def test_labels_of_words_are_numbered_in_order(bert: Loaded, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": name} for name in ("zebra", "ant", "zebra")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = load_data(tmp_path / "d.jsonl", bert).batches[0].labels
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
