"""The conditional transformer: a CLIP embedding as prefix, an image's tokens after it, each told from those before.

Wang et al. 2022 (CLIP-GEN, arXiv 2203.00386), equations of section 3.2; the network is transformers' GPT-2 (pre-norm,
learnt positions), fed by `inputs_embeds`.

A token's vectors, as input and in the logits, are partly a function of its code (`CodeVectors`). The published model
has tables, which know nothing of what codes stand for and learn each by itself.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd import checkpoint
from dmd.chance import pinned
from dmd.clipgen.tokenizer import Update
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.seeding import Stream

CONFIG, WEIGHTS = "transformer.json", "transformer.safetensors"
KIND = "dmd-clip-gen"


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a conditional transformer.

    Attributes:
        codes: how many tokens there are.
        code_width: numbers in the code that a token stands for.
        length: tokens of an image.
        condition: numbers in an embedding.
        layers, width, heads: of the transformer.
        dropout: everywhere in it.
        prefix: inputs that the embedding becomes. One, as published, must carry all of it through the first layers.
    """

    codes: int
    code_width: int
    length: int
    condition: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    prefix: int = 1


class CodeVectors(nn.Module):
    """A vector for each token: one of its own, and what a small network makes of its code.

    So what is learnt about a token is learnt about those that look like it.
    """

    HIDDEN = 64
    SCALE = 0.1  # of the network's part at the start, beside 0.02 of the own vectors, GPT-2's

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.own = nn.Parameter(0.02 * torch.randn(config.codes, config.width))
        layers = nn.Linear(config.code_width, self.HIDDEN), nn.GELU(), nn.Linear(self.HIDDEN, config.width)
        self.shared = nn.Sequential(*layers)

    def forward(self, codebook: Tensor) -> Tensor:
        """(codes, width) from codes (codes, code_width) of length one."""
        return self.own + self.SCALE * self.shared(codebook * codebook.shape[1] ** 0.5)


class ConditionalTransformer(nn.Module):
    """p(token t | embedding, tokens before t); fresh weights come from torch's global random state.

    Args:
        codebook: (codes, code_width) of the tokenizer, kept with the weights; left out where weights will be loaded.
    """

    codebook: Tensor

    def __init__(self, config: TransformerConfig, codebook: Tensor | None = None):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        self.config = config
        self.gpt: Any = GPT2Model(
            GPT2Config(
                vocab_size=1,  # its table of tokens is not used
                n_positions=config.prefix + config.length - 1,  # all tokens but the last
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.gpt.set_input_embeddings(nn.Identity())
        self.register_buffer("codebook", torch.zeros(config.codes, config.code_width))
        if codebook is not None:
            self.codebook.copy_(codebook)
        self.inputs, self.outputs = CodeVectors(config), CodeVectors(config)
        self.project = nn.Linear(config.condition, config.prefix * config.width)
        self.null = nn.Parameter(0.02 * torch.randn(config.prefix, config.width))

    def prefix(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The first inputs (B, prefix, width).

        Args:
            condition: (B, condition) of length one.
            dropped: bool (B,), where the learnt embedding of no condition stands instead.
        """
        found = self.project(condition * self.config.condition**0.5).unflatten(1, self.null.shape)  # unit variance
        if dropped is not None:
            found = torch.where(dropped[:, None, None], self.null.to(found.dtype), found)
        return found

    def forward(self, condition: Tensor, tokens: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Logits (B, length, codes) of every token, each from those before it.

        Args:
            condition: (B, condition).
            tokens: (B, length) int64; the last one is not looked at.
            dropped: see `prefix`.
        """
        before = F.embedding(tokens[:, :-1], self.inputs(self.codebook))
        inputs = torch.cat((self.prefix(condition, dropped), before), dim=1)
        hidden = self.gpt(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, self.config.prefix - 1 :]
        return F.linear(hidden, self.outputs(self.codebook))

    def start(self, prefix: Tensor) -> tuple[Tensor, "Past"]:
        """Logits (B, codes) of the first token after the prefix (B, prefix, width), and what `following` needs."""
        return self._next(prefix, Past(self.inputs(self.codebook), self.outputs(self.codebook), None))

    def following(self, token: Tensor, past: "Past") -> tuple[Tensor, "Past"]:
        """Logits (B, codes) of the token after `token` (B,), and a past that now includes it."""
        return self._next(F.embedding(token[:, None], past.inputs), past)

    def _next(self, inputs: Tensor, past: "Past") -> tuple[Tensor, "Past"]:
        out = self.gpt(inputs_embeds=inputs, past_key_values=past.keys_and_values, use_cache=True)
        return F.linear(out.last_hidden_state[:, -1], past.outputs), replace(past, keys_and_values=out.past_key_values)


@dataclass(frozen=True, eq=False)
class Past:
    """What is kept from token to token: all tokens' vectors (codes, width), and the keys and values so far."""

    inputs: Tensor
    outputs: Tensor
    keys_and_values: Any


def save(net: ConditionalTransformer, folder: Path, facts: dict[str, Any]) -> None:
    """Write a transformer into a model's folder, with `facts` about what it belongs to; the weights come last."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / CONFIG, {"kind": KIND, "sizes": asdict(net.config)} | facts)
    checkpoint.save_weights(net, folder / WEIGHTS)


def load(folder: Path, device: torch.device) -> tuple[ConditionalTransformer, dict[str, Any]]:
    """A transformer, frozen, and the facts beside it.

    Raises:
        InputError: the folder holds none, or a damaged one.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw["kind"] != KIND:
            raise ValueError
        net = ConditionalTransformer(TransformerConfig(**raw["sizes"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not a model of dmd clipgen: it needs {CONFIG} of {KIND}") from None
    checkpoint.load_weights(net, folder / WEIGHTS)
    return net.to(device).eval().requires_grad_(False), raw


# ----------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TokenBatch:
    """What a step sees.

    Attributes:
        tokens: (B, length) int64.
        condition: (B, condition), what the transformer is told.
        embedding: (B, condition), CLIP's own embedding of the image, which the reconstruction term aims at.
        dropped: bool (B,), where the condition is left out.
    """

    tokens: Tensor
    condition: Tensor
    embedding: Tensor
    dropped: Tensor


Reembed = Callable[[Tensor], Tensor]
"""Mixtures (B, length, codes) of codes, each of sum one, to the CLIP embedding of the image, (B, D); differentiable."""


def embedding_loss(logits: Tensor, embedding: Tensor, reembed: Reembed) -> Tensor:
    """1 - cos(e, CLIP(decode(tokens))), for the likeliest tokens; the gradient is that of their probabilities.

    CLIP-GEN's embedding reconstruction, with the straight-through argmax of its published code. The paper's formula is
    not clear about the distance; the cosine is CLIP's own.

    Args:
        logits: (B, length, codes).
        embedding: (B, D) of length one.
    """
    soft = logits.softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return 1.0 - F.cosine_similarity(reembed(hard + soft - soft.detach()), embedding, dim=-1).mean()


class Modelling:
    """A `dmd.run.Task`: one update of a conditional transformer a step.

    loss = -mean log p(s_t | s_<t, e) + embedding_weight * embedding_loss

    Args:
        net: what is trained.
        optimizers: see `optimizers`.
        ema: its average, which is evaluated and exported.
        embedding_weight: 0 leaves the term out, and then `reembed` is not called.
        max_norm: gradients are clipped to it.
        update: see `dmd.clipgen.tokenizer.Update`.
        seed, rank: key dropout.
        autocast: dtype of the network's arithmetic.
    """

    def __init__(
        self, net: ConditionalTransformer, optimizers: Mapping[str, Optimizer], ema: Ema, embedding_weight: float,
        reembed: Reembed, max_norm: float, update: Update, seed: int, rank: int = 0,
        autocast: torch.dtype | None = None,
    ):  # fmt: skip
        self.net = net.train()
        self._optimizers = dict(optimizers)
        self.ema = ema
        self.embedding_weight = embedding_weight
        self.reembed = reembed
        self.max_norm = max_norm
        self.update = update
        self.seed, self.rank = seed, rank
        self.autocast = autocast

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return self._optimizers

    def step(self, step: int, batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
        """One update over the micro-batches. Raises `NotFinite` (by `update`) before a bad one."""
        self.net.zero_grad()
        figures: dict[str, Tensor] = {}
        for k, b in enumerate(batches):
            with (
                pinned(self.seed, Stream.TRANSFORMER_DROPOUT, step * len(batches) + k, self.rank, b.tokens.device),
                torch.autocast(b.tokens.device.type, self.autocast, enabled=self.autocast is not None),
            ):
                logits = self.net(b.condition, b.tokens, b.dropped)
            logits = logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), b.tokens.flatten())
            part = {"loss/tokens": loss, "right": (logits.detach().argmax(-1) == b.tokens).float().mean()}
            if self.embedding_weight:
                part["loss/embedding"] = embedding_loss(logits, b.embedding, self.reembed)
                loss = loss + self.embedding_weight * part["loss/embedding"]
            (loss / len(batches)).backward()
            for name, value in part.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / len(batches)
        figures["grad/net"] = self.update(list(self.net.parameters()), self.max_norm, figures)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.ema.update(self.net, step)
        return figures


def optimizers(net: ConditionalTransformer, lr: float, weight_decay: float, muon: bool) -> dict[str, Optimizer]:
    """AdamW (0.9, 0.95) that decays matrices only; groups know their full rate, as `dmd.run` expects.

    Args:
        muon: leave the layers' matrices to Muon (Jordan et al. 2024), scaled such that AdamW's rate and decay serve
            (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    layers = [p for p in net.gpt.h.parameters() if p.ndim == 2] if muon else []
    own = {id(p) for p in layers}
    rest = [p for p in net.parameters() if id(p) not in own]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "initial_lr": lr},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "initial_lr": lr},
    ]
    found: dict[str, Optimizer] = {"net": torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)}
    if muon:
        group = {"params": layers, "initial_lr": lr}
        found["layers"] = torch.optim.Muon([group], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return found
