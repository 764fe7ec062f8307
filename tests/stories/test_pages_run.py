"""The commands of the README and of the help pages, run in the order in which a page shows them, as a reader would.

Models and data are small ones of the names that the pages use, made below. What else differs from the page is in
SMALLER and in `asked`; what is not run is in NOT_RUN, with the reason and the test that runs the same code.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.onnx_files import perceptron
from test_docs import README, pages
from torch import nn

from fxprune.cli.entry import main
from fxprune.process.libraries import survive_torchvision

ROOT = README.parent
PAGES = pages()

# a word of the page -> what stands in its place here
SMALLER = {
    "timm:vit_small_patch16_224": "timm:test_vit"  # timm's own small one, at 160 pixels
}
TOGETHER = "fxprune compile ./my-bert --flops 0.5 --data train.csv"  # stands behind torchrun
# a part of a command -> why it is not run here, and which test file runs what it does
NOT_RUN = {
    "fxprune demo": ("it trains a network for a minute", "tests/cli/test_demo.py"),
    "--latency 0.6": ("it measures time for minutes", "tests/driver/test_decide_latency.py"),
    "fxprune sweep": ("it makes and times a model per ratio", "tests/workflows/test_sweep.py"),
    "fxprune bench": ("it measures time", "tests/cli/test_cli.py"),
    "--target inductor": ("it compiles C++ for most of a minute", "tests/backends/test_inductor.py"),
    "--tokens 'tome{schedule=auto}'": ("it measures curves of every schedule", "tests/driver/test_decide_tokens.py"),
    "--prune heads,ffn,tokens": ("it tries shares of the budget and schedules", "tests/driver/test_decide_tokens.py"),
    "--against ./qwen": ("small is made of another model here", "tests/backends/test_hf.py"),
    TOGETHER: ("torchrun starts processes", "tests/process/test_ranks.py"),
}
# lines of shell blocks that are no commands of fxprune, and what runs them
OTHER = {"pip install .": "tools/release", 'pip install -e ".[test]"': ".ci/run", "python -m pytest -n 2": ".ci/run"}
WORDS = ["a", "the", "film", "plot", "was", "good", "bad", "dull", "fine", "slow", "bright", "and", "but", "not"]


def network() -> nn.Module:
    """A block of attention and MLP from classes of torch: such a pickle loads without being trusted."""
    torch.manual_seed(0)
    block = nn.Sequential(
        OrderedDict(
            attn=nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True),
            mlp=nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)),
        )
    )
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(block), head=nn.Linear(16, 5)))


def save_bert(folder: str, seed: int) -> None:
    import transformers

    torch.manual_seed(seed)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=len(known),
            max_position_embeddings=32,
            num_labels=2,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder, known)


def save_tokenizer(folder: str, known: Sequence[str]) -> None:
    import transformers

    vocabulary = Path(folder, "vocab.txt")
    vocabulary.write_text("\n".join(known) + "\n")
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)


def save_qwen(folder: str, seed: int) -> None:
    import transformers

    torch.manual_seed(seed)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            vocab_size=len(known),
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder, known)


def save_sentences(path: str, count: int) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{' '.join(rng.choice(WORDS, 6))},{rng.integers(2)}\n" for _ in range(count)]
    Path(path).write_text("text,label\n" + "".join(lines))


def save_pictures(folder: str) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path(folder, name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(Path(folder, name, f"{i}.png"))


def save_vit(path: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=2
    )
    torch.save(model.eval(), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every model and data set that the pages name."""
    survive_torchvision()
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_bert("my-bert", 0)
        save_bert("my-other-bert", 1)
        save_qwen("qwen", 0)
        save_qwen("qwen-chat", 1)
        save_sentences("train.csv", 48)
        save_sentences("test.csv", 32)
        texts = (json.dumps({"text": " ".join(WORDS[i : i + 6])}) for i in range(8))
        Path("text.jsonl").write_text("\n".join(texts) + "\n")
        save_pictures("images")
        save_vit("vit.pt")
        torch.save(network(), "model.pt")
        np.savez("data.npz", x=torch.randn(8, 9, 16).numpy())
        perceptron(Path("model.onnx"))
        np.savez("samples.npz", x=torch.randn(160, 16).numpy())
        assert main(["plan", "./my-bert", "--flops", "0.5", "--out", "plan.json", "-q"]) == 0
        Path("fxprune.toml").write_text("samples = 8\n")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def asked(command: str) -> list[str]:
    """The words of the command; ``model.pt`` cannot say what it takes, so the shape is given."""
    words = [SMALLER.get(word, word) for word in shlex.split(command)[1:]]
    return [*words, "--input", "2x9x16"] if words[1:2] == ["model.pt"] else words


def expected(command: str) -> int:
    """0, or 4 where the target, or what the delivery holds, needs a GPU that is not there."""
    of_a_gpu = re.search(r"--target \S*trt|verify release", command)
    return 4 if of_a_gpu and not torch.cuda.is_available() else 0


def not_run(command: str) -> bool:
    return command == TOGETHER or any(part in command for part in NOT_RUN if part != TOGETHER)


def to_run(page: str) -> list[str]:
    """The commands of a page; what the README runs already only where a later one needs what it makes."""
    elsewhere = set() if page == "README" else set(PAGES["README"])
    found: list[str] = []
    needed: set[str] = set()
    for command in reversed(PAGES[page]):
        words = shlex.split(command)
        makes = words[words.index("--out") + 1] if "--out" in words else None
        if command not in elsewhere or makes in needed:
            found.insert(0, command)
            needed |= set(words)
    return found


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=() if name == "README" else pytest.mark.drawn(3))
        for name, commands in PAGES.items()
        if commands
    ],
)
def test_the_commands_of_a_page_run(
    page: str,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    for command in to_run(page):
        if not not_run(command):
            code = main(asked(command))
            said = capsys.readouterr()
            assert code == expected(command), f"{command}\n{said.err}"


@pytest.mark.parametrize("part", NOT_RUN)
def test_what_is_not_run_is_in_a_page_and_run_elsewhere(part: str) -> None:
    assert any(part in command for commands in PAGES.values() for command in commands)
    assert (ROOT / NOT_RUN[part][1]).exists()


def test_most_commands_are_run() -> None:
    every = {command for commands in PAGES.values() for command in commands}
    assert len([c for c in every if not not_run(c)]) >= 0.75 * len(every)


def test_every_line_of_a_shell_block_is_accounted_for() -> None:
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = [
        part.strip() for block in blocks for line in block.splitlines() for part in line.partition("  #")[0].split("&&")
    ]
    for line in filter(None, lines):
        assert re.match(r"fxprune [a-z]|torchrun .* -m fxprune [a-z]", line) or line in OTHER, line
    for line, where in OTHER.items():
        assert line in lines
        program = line.split()[0] if line.startswith("pip") else line
        assert program in (ROOT / where).read_text(encoding="utf-8")


def test_python_lines_of_the_pages_run(capsys: pytest.CaptureFixture[str]) -> None:
    from fxprune.cli.help import TOPICS, page

    found = [line for topic in TOPICS for line in re.findall(r'python -c "([^"]*)"', page(topic))]
    assert found
    for line in found:
        assert "help(" in line
        about: dict[str, object] = {}
        exec(re.sub(r"help\((.*)\)", r"found = \1", " ".join(line.split())), about)
        assert len(inspect.getdoc(about["found"]) or "") > 80
