"""Private names of other libraries: each use has its reason beside it, and a test that notices when the name goes."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import BertConfig, BertModel, GenerationMixin, PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

ROOT = Path(__file__).parent.parent
CHECKED = ("qtuning_fast", "kernels", "bench")


def has_operator(name: str) -> Callable[[], bool]:
    return lambda: hasattr(torch.ops.aten, name)


def hook_of_accelerate() -> bool:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return hasattr(add_hook_to_module(nn.Linear(1, 1), ModelHook()), "_hf_hook")


# Name -> whether it is still there and what it was.
PRIVATE: dict[str, Callable[[], bool]] = {
    # PyTorch
    "_are_functorch_transforms_active": lambda: torch._C._are_functorch_transforms_active() is False,
    "_current_level": lambda: forward_ad._current_level == -1,
    "_dynamo_marked_constant": lambda: torch.compiler.assume_constant_result(lambda: 0)._dynamo_marked_constant,
    "_is_zerotensor": lambda: torch.ones(1)._is_zerotensor() is False,
    "_len_torch_dispatch_stack": lambda: torch._C._len_torch_dispatch_stack() == 0,
    "_schema": lambda: bool(torch.ops.aten.relu.default._schema.arguments),
    "_sdp_enabled": lambda: torch.backends.cuda.flash_sdp_enabled() in (True, False),  # the end of a public name
    "_parameters": lambda: isinstance(nn.Linear(1, 1)._parameters, dict),
    "_extra_state": lambda: torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX == "_extra_state",
    "_dynamo": lambda: callable(torch._dynamo.reset),
    "_cuda_endAllocateToPool": lambda: not torch.cuda.is_available() or hasattr(torch._C, "_cuda_endAllocateToPool"),
    **{
        name: has_operator(name)
        for name in (
            "_efficient_attention_backward",
            "_efficient_attention_forward",
            "_flash_attention_backward",
            "_flash_attention_forward",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        )
    },
    "_cdata": lambda: isinstance(torch.ones(1).untyped_storage()._cdata, int),
    # Python
    "_exit": lambda: callable(os._exit),  # public, for all its name
    # NumPy: what a pickled array names
    "_reconstruct": lambda: np.zeros(1).__reduce__()[0].__name__ == "_reconstruct",
    # Triton
    "_do_compile": lambda: hasattr(pytest.importorskip("triton").runtime.jit.JITFunction, "_do_compile"),
    "_active": lambda: hasattr(pytest.importorskip("triton").runtime.driver, "_active"),
    # transformers and accelerate
    "_attn_implementation": lambda: isinstance(
        inspect.getattr_static(PreTrainedConfig, "_attn_implementation"), property
    ),
    "_gradient_checkpointing_func": lambda: (
        "_gradient_checkpointing_func" in inspect.getsource(GradientCheckpointingLayer)
    ),
    "_hf_hook": hook_of_accelerate,
    "_n_gpu": lambda: "_n_gpu" in inspect.getsource(TrainingArguments),
    "_name_or_path": lambda: BertConfig()._name_or_path == "",
    "_require_grads_hooks": lambda: (
        "_require_grads_hooks" in inspect.getsource(PreTrainedModel.disable_input_require_grads)
    ),
    "_supports_logits_to_keep": lambda: callable(GenerationMixin._supports_logits_to_keep),
}


# Of packages that need a GPU of their own: the code asks whether they are there, and what they take, before it calls.
ASKED_FOR = {"_flash_attn_fwd", "_flash_attn_bwd"}
NO_NAMES = {"_C", "_type", "_kernel"}  # PyTorch's module of all these; a key in a file's format; the end of a name
DOCUMENTED = {"_getframe"}  # by Python


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_names(trees: list[ast.Module]) -> set[str]:
    """What this project itself defines, imports or assigns."""
    found: set[str] = {"_fields", "_replace", "_asdict"}  # of named tuples, which document them
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            found.add(node.attr)
    return found


def used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and private(node.value):
            yield node.lineno, str(node.value)


def test_no_other_private_name_is_used() -> None:
    paths = [path for folder in CHECKED for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in paths]
    own, unknown, known = own_names(trees), [], set()
    for path, tree in zip(paths, trees):
        for line, name in used(tree):
            if name in PRIVATE:
                known.add(name)
            elif name not in own | ASKED_FOR | NO_NAMES | DOCUMENTED:
                unknown.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not unknown
    assert known == PRIVATE.keys(), "a name that nothing uses any more"


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_still_there(name: str) -> None:
    assert PRIVATE[name]()


def test_a_config_switches_attention_by_its_private_name() -> None:
    """What `_attn_implementation` is for: the public setter reloads kernels and warns."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=9))
    model.config._attn_implementation = "eager"
    assert model.encoder.layer[0].attention.self.config._attn_implementation == "eager"
