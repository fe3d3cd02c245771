"""The trainable rows `[P* ; P_new ; W ∘ Q_old]` in front of a context: keys and values of a layer, or embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.method.reweighting import Reweighting

KEY_STD = 0.5  # keys that start smaller collapse onto one direction
VALUE_STD = 0.02


@dataclass(frozen=True)
class LayerShape:
    """The sizes of an attention layer: query heads, key/value heads, head size of keys and of values."""

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int

    @property
    def row_features(self) -> int:
        """The length of a row's feature vector `[k ; v]`."""
        return self.num_kv_heads * (self.key_size + self.value_size)

    def to_rows(self, key: Tensor, value: Tensor) -> Tensor:
        """Concatenate keys `[Hkv, n, D]` and values `[Hkv, n, Dv]` into rows `[n, F]`."""
        return torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=1)

    def from_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows `[n, F]` into keys `[Hkv, n, D]` and values `[Hkv, n, Dv]`."""
        sizes = (self.num_kv_heads * self.key_size, self.num_kv_heads * self.value_size)
        key, value = rows.split(sizes, dim=1)
        heads = (self.num_kv_heads, -1)
        return key.unflatten(1, heads).transpose(0, 1), value.unflatten(1, heads).transpose(0, 1)


class PromptRows(nn.Module):
    """Trainable rows `[P* ; P_new ; W ∘ Q_old]` (Q-tuning, arXiv 2404.14607).

    Rows are feature vectors `[n, F]`, as in the queue.

    Args:
        features: F.
        shared_length: S.
        rank: of `W`; None without a reweighting: old rows keep the scale at which they start.
        uniform: whether new rows are drawn from U(−1, 1).

    Attributes:
        shared: `[S, F]`, the shared prompt `P*` of all tasks.
        prompt: `[l, F]`, the prompt of the task in training; empty before the first task.
        old: `[n, F]`, the queue's rows, frozen.
        row_scale: `[n]`, the weight at which each old row starts.
    """

    old: Tensor
    row_scale: Tensor

    def __init__(self, features: int, *, shared_length: int, rank: int | None, uniform: bool = False) -> None:
        super().__init__()
        self.rank = rank
        self.uniform = uniform
        self._features = features
        self.shared = nn.Parameter(self.new_rows(shared_length))
        self.prompt = nn.Parameter(self.new_rows(0))
        # The queue saves its rows and their scale.
        self.register_buffer("old", torch.zeros(0, features), persistent=False)
        self.register_buffer("row_scale", torch.zeros(0), persistent=False)

    def new_rows(self, n: int) -> Tensor:
        """Return `n` initial rows `[n, F]` of a prompt."""
        return torch.empty(n, self._features).uniform_(-1, 1) if self.uniform else self._default_rows(n)

    def _default_rows(self, n: int) -> Tensor:
        raise NotImplementedError

    def begin(self, prompt: Tensor, old: Tensor, row_scale: Tensor) -> None:
        """Start a new task.

        Args:
            prompt: `[l, F]`, where the new prompt starts.
            old: `[n, F]`, the queue's rows.
            row_scale: `[n]`, the weight of each old row at the start.
        """
        device = self.shared.device
        self.prompt = nn.Parameter(prompt.to(device))
        self.old, self.row_scale = old.to(device), row_scale.to(device)

    def no_rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows and the scale of an empty queue."""
        return self.old.new_zeros(0, self.old.shape[1]), self.old.new_zeros(0)

    @property
    def reweightings(self) -> list[Reweighting]:
        """The parts of `W`; empty where old rows are not reweighted."""
        return [module for module in self.children() if isinstance(module, Reweighting)]

    def row_weights(self) -> Tensor:
        """Return `W` of the old rows as `[n, F]`."""
        return self.row_scale[:, None].expand_as(self.old)


class LayerPrefix(PromptRows):
    """The rows of one attention layer, keys and values beside those of its context: `F = Hkv * (D + Dv)`.

    Attributes:
        reweight_key, reweight_value: `W` of the old rows; None while there are no old rows.
    """

    reweight_key: Reweighting | None
    reweight_value: Reweighting | None

    def __init__(self, shape: LayerShape, *, shared_length: int, rank: int | None, uniform: bool = False) -> None:
        self.shape = shape
        super().__init__(shape.row_features, shared_length=shared_length, rank=rank, uniform=uniform)
        self.register_module("reweight_key", None)
        self.register_module("reweight_value", None)

    def _default_rows(self, n: int) -> Tensor:
        """Draw `n` rows: keys from N(0, 0.5²), values from N(0, 0.02²)."""
        shape = self.shape
        keys = KEY_STD * torch.randn(n, shape.num_kv_heads * shape.key_size)
        values = VALUE_STD * torch.randn(n, shape.num_kv_heads * shape.value_size)
        return torch.cat([keys, values], dim=1)

    def begin(self, prompt: Tensor, old: Tensor, row_scale: Tensor) -> None:
        super().begin(prompt, old, row_scale)
        shape = self.shape
        self.reweight_key = self.reweight_value = None
        if len(old) and self.rank is not None:
            heads, device = shape.num_kv_heads, self.shared.device
            self.reweight_key = Reweighting(row_scale, heads, shape.key_size, self.rank).to(device)
            self.reweight_value = Reweighting(row_scale, heads, shape.value_size, self.rank).to(device)

    def row_weights(self) -> Tensor:
        if self.reweight_key is None or self.reweight_value is None:
            return super().row_weights()
        return self.shape.to_rows(self.reweight_key(), self.reweight_value())

    def arguments(self, prompt: Tensor) -> PrefixArguments:
        """Return the rows as keyword arguments of `prefix_attention`, which applies the reweighting.

        Args:
            prompt: `[l, F]`, the new prompt, reparametrised or not.
        """
        n_shared, old = len(self.shared) + len(prompt), self.old
        arguments: PrefixArguments = {"n_shared": n_shared}
        if self.reweight_key is not None and self.reweight_value is not None:
            arguments["reweight_key"] = self.reweight_key.behind(n_shared)
            arguments["reweight_value"] = self.reweight_value.behind(n_shared)
        elif len(old):
            old = self.row_weights() * old
        key, value = self.shape.from_rows(torch.cat([self.shared, prompt, old]))
        return arguments | {"prefix_key": key, "prefix_value": value}

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the prefix with `W` folded in: keys `[Hkv, P, D]`, values `[Hkv, P, Dv]`."""
        key, value = self.shape.from_rows(torch.cat([self.shared, self.prompt, self.row_weights() * self.old]))
        return key.clone(), value.clone()


class InputPrompt(PromptRows):
    """Embeddings in front of the input, `F = E`: Q-tuning's own placement.

    Args:
        vocabulary: the base model's word embedding; new rows are embeddings of random words (Lester et al., EMNLP
            2021, section 3.2). None, as in image models: rows start from N(0, 0.02²).
        features: E.
    """

    reweight: Reweighting | None

    def __init__(
        self,
        vocabulary: nn.Embedding | None,
        features: int,
        *,
        shared_length: int,
        rank: int | None,
        uniform: bool = False,
    ) -> None:
        self._vocabulary = () if vocabulary is None else (vocabulary,)  # a tuple, so that it is not a submodule
        super().__init__(features, shared_length=shared_length, rank=rank, uniform=uniform)
        self.register_module("reweight", None)

    @torch.no_grad()
    def _default_rows(self, n: int) -> Tensor:
        """Return `n` embeddings of random words."""
        if not self._vocabulary:
            return VALUE_STD * torch.randn(n, self._features)
        words = self._vocabulary[0]
        picked = torch.randint(words.num_embeddings, (n,))
        # An offloaded embedding moves its input to the device on which it computes.
        placed = picked if words.weight.is_meta else picked.to(words.weight.device)
        return words(placed).to("cpu", torch.float32)

    def begin(self, prompt: Tensor, old: Tensor, row_scale: Tensor) -> None:
        super().begin(prompt, old, row_scale)
        self.reweight = None
        if len(old) and self.rank is not None:
            self.reweight = Reweighting(row_scale, 1, self._features, self.rank).to(self.shared.device)

    def row_weights(self) -> Tensor:
        return super().row_weights() if self.reweight is None else self.reweight().squeeze(0)

    def embeddings(self, prompt: Tensor) -> Tensor:
        """Return the reweighted rows `[P, E]`.

        Args:
            prompt: `[l, E]`, the new prompt, reparametrised or not.
        """
        return torch.cat([self.shared, prompt, self.row_weights() * self.old])
