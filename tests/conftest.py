"""What several test files need: random calls of prefix_attention, a tiny BERT, and toy tasks that train in a second."""

from __future__ import annotations

import os
import random
import runpy
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU

import transformers
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast, DynamicCache
from transformers.modeling_outputs import SequenceClassifierOutput

from qtuning_fast import prefix_attention
from qtuning_fast.integrations.transformers.caches import CACHE
from qtuning_fast.kernels import native
from qtuning_fast.kernels.target import INTERPRETED

torch.set_num_threads(1)  # one a worker: two workers share two cores
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Arguments = dict[str, Any]

COLOURS = ["red", "green", "blue", "yellow"]
ANIMALS = ["cat", "dog", "horse", "bird"]
WORDS = ["the", "a", "is", "was", "seen", "here", "there", "old", "new", "very"]


def _round_products_once() -> None:
    """Products in Triton's interpreter: sums in float64, rounded to what the kernel asks for.

    NumPy's float32 sums depend on the processor, on the kernels of its BLAS, and on the order of the factors. Without
    FMA they lose more than PyTorch's; with it q kᵀ and (k qᵀ)ᵀ can differ, and backward kernels would not find the
    scores that the log-sum-exp was made of.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        sums = multiply(self, a, b, TensorHandle(d.data.astype("float64"), tl.float64), *options)
        return TensorHandle(sums.data.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _round_products_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th test from the I-th on")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("native") and (why_not := native.obstacle()):
        pytest.skip(why_not)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _tiny_config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertConfig(**(sizes | {"intermediate_size": 48, "max_position_embeddings": 64} | changes))


@pytest.fixture
def tiny_config() -> Callable[..., BertConfig]:
    return _tiny_config


@pytest.fixture
def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(_tiny_config()).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 6:] = 0
    mask[3, 1:] = 0
    return {"input_ids": torch.randint(5, 40, (4, 10), generator=generator), "attention_mask": mask}


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *ANIMALS, *WORDS]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(_tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the hub on localhost, where `user` is logged in; see stand_in_hub.py."""
    running = runpy.run_path(str(Path(__file__).with_name("stand_in_hub.py")), run_name="stand_in_hub")["running"]
    constants = huggingface_hub.constants
    with running() as stand_in:
        changed = {
            "ENDPOINT": stand_in.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,  # its storage is another server
        }
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_user")
        monkeypatch.setattr("huggingface_hub.file_download.time", _NoWaiting)
        yield stand_in


class _NoWaiting:
    """In place of the module `time`, between attempts to download."""

    @staticmethod
    def sleep(seconds: float) -> None:
        pass


def toy_rows(words: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts whose label is the one word of `words` they hold; all different."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = words[len(rows) % len(words)]
        text = [*draw.choices(WORDS, k=6)]
        text.insert(draw.randrange(7), label)
        rows.setdefault(" ".join(text), label)
    return list(rows.items())


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four toy tasks as CSV files."""
    folder = tmp_path_factory.mktemp("toy")
    files = {}
    for name, words in {
        "colours": COLOURS[:2],
        "animals": ANIMALS[:3],
        "warm": COLOURS[2:],
        "pets": ANIMALS[2:],
    }.items():
        files[name] = folder / f"{name}.csv"
        lines = ["text,label", *(f"{text},{label}" for text, label in toy_rows(words, 48))]
        files[name].write_text("\n".join(lines))
    return files


def _make_call(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    prefix_dtype: torch.dtype | None = None,  # that of prefix, reweighting and gate: dtype
    B: int = 2,
    Hkv: int = 2,
    G: int = 2,
    N: int = 3,
    M: int = 4,
    P: int = 3,
    D: int = 3,
    Dv: int = 2,
    T: int | None = None,  # prefixes in a bank; None: no bank
    lengths: bool = False,
    n_shared: int = 0,
    rank_key: int | None = None,
    rank_value: int | None = None,
    gate: str | None = "tanh",
    gate_shape: str = "float",  # "float", "scalar", "head", "task", "task, head"
    mask: str
    | None = None,  # "padding bool", "padding float", "full bool", "full float", "shared float + padding bool"
    bias: bool = False,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: bool = False,
    packed: tuple[list[int], list[int]] | None = None,  # queries and keys of each packed sequence, instead of B, N, M
) -> Arguments:
    """Random arguments; every tensor that may require a gradient does."""
    if packed is not None:
        B, N, M = 1, *map(sum, packed)
    samples = B if packed is None else len(packed[0])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def trained(*shape: int) -> Tensor:
        return normal(*shape, dtype=prefix_dtype or dtype).requires_grad_()

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def masking(kind: str, *shape: int) -> Tensor:
        visible = integers(3, *shape) > 0
        return visible if "bool" in kind else normal(*shape).masked_fill(~visible, -torch.inf)

    Hq, bank = G * Hkv, () if T is None else (T,)
    parameter_shape = {"scalar": (), "head": (Hq,), "task": (T, 1), "task, head": (T, Hq)}.get(gate_shape)
    arguments: Arguments = {
        "query": normal(B, Hq, N, D).requires_grad_(),
        "key": normal(B, Hkv, M, D).requires_grad_(),
        "value": normal(B, Hkv, M, Dv).requires_grad_(),
        "prefix_key": trained(*bank, Hkv, P, D),
        "prefix_value": trained(*bank, Hkv, P, Dv),
        "n_shared": n_shared,
        "gate": gate,
        "gate_alpha": 0.7 if parameter_shape is None else trained(*parameter_shape),
        "gate_tau": 1.3 if parameter_shape is None else trained(*parameter_shape),
        "is_causal": is_causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
    }
    if packed is not None:
        for side, rows in zip(("query", "key"), packed):
            arguments[f"cu_seqlens_{side}"] = torch.tensor([0, *accumulate(rows)], dtype=torch.int32)
    if T is not None:
        arguments["prefix_index"] = integers(T, samples)
        if lengths:
            arguments["prefix_length"] = integers(P + 1, T)
    for name, rank, size in (("reweight_key", rank_key, D), ("reweight_value", rank_value, Dv)):
        if rank is not None:
            arguments[name] = (trained(*bank, P, rank), trained(*bank, rank, Hkv, size))
    for kind in [] if mask is None else mask.split(" + "):
        name = "padding_mask" if kind != mask and "padding" in kind else "attn_mask"
        several = 1 if "shared" in kind else B
        arguments[name] = masking(kind, B, M) if "padding" in kind else masking(kind, several, 1, N, M)
    if bias:
        arguments["prefix_bias"] = normal(1, Hq, N, P) if packed is None else normal(samples, Hq, 1, P)
    if sink:
        arguments["sink"] = trained(Hq)
    return arguments


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    """The tensors of a call that require a gradient, the halves of a pair (U, V) as `name[0]` and `name[1]`."""
    flat = {}
    for name, x in arguments.items():
        flat |= {f"{name}[{i}]": half for i, half in enumerate(x)} if isinstance(x, tuple) else {name: x}
    return {name: x for name, x in flat.items() if isinstance(x, Tensor) and x.requires_grad}


def _gradients(arguments: Arguments, d_output: Tensor) -> dict[str, Tensor]:
    """The gradient of each leaf of a call; zeros where none arrives."""
    leaves = _leaves(arguments)
    output = prefix_attention(**arguments)
    grads = torch.autograd.grad(output, list(leaves.values()), d_output, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads))


@pytest.fixture(scope="session")
def make_call():
    return _make_call


@pytest.fixture(scope="session")
def leaves():
    return _leaves


@pytest.fixture(scope="session")
def gradients():
    return _gradients


def _prefix_by_hand(adapted: Any) -> Callable[..., Any]:
    """Prefix tuning as peft defines it, but not by peft's forward: P rows are in each layer's cache before the input.

    The mask covers them, and the model's own positions go on behind what a cache holds, so tokens stand P further on.
    """
    settings, encoder = adapted.active_peft_config, adapted.prompt_encoder[adapted.active_adapter]
    base, P = adapted.get_base_model(), settings.num_virtual_tokens

    def compute(input_ids: Tensor, attention_mask: Tensor) -> Any:
        rows = encoder.embedding.weight if settings.inference_mode else encoder(torch.arange(P))
        layers = rows.view(P, settings.num_layers, 2, settings.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
        cache = DynamicCache(config=base.config)
        for layer, pair in enumerate(layers):
            cache.update(*(x.expand(len(input_ids), -1, -1, -1) for x in pair), layer)
        mask = torch.cat([attention_mask.new_ones(len(input_ids), P), attention_mask], dim=1)
        inputs = {"input_ids": input_ids, "attention_mask": mask, CACHE: cache}
        if settings.task_type != "SEQ_CLS":
            return base(**inputs)
        return SequenceClassifierOutput(logits=base.classifier(base.base_model(**inputs).pooler_output))

    return compute


@pytest.fixture(params=["by peft", "by hand"])
def computed(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What computes a peft model with a prefix: peft itself where it can, and everywhere a few lines of ours.

    peft reads what models call their arguments, so a version of it works with some versions of transformers only.
    """

    def choose(adapted: Any, inputs: dict[str, Tensor]) -> Callable[..., Any]:
        if request.param == "by hand":
            return _prefix_by_hand(adapted)
        try:
            adapted(**inputs)
        except Exception as error:
            pytest.skip(f"peft computes no prefix with transformers {transformers.__version__}: {error}")
        return adapted

    return choose
