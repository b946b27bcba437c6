"""The image tokenizer: a VQGAN-style autoencoder whose features are the nearest of a set of codes, and its training.

Esser et al. 2021 (arXiv 2012.09841), with the codes of Yu et al. 2022 (arXiv 2110.04627): few numbers each, of length
one, a moving average of what they stand for; codes that nothing uses are replaced by features of the batch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd import checkpoint, processes
from dmd.chance import pinned
from dmd.clipgen.networks import ConvSizes, Decoder, encoder, sizes_from
from dmd.errors import InputError
from dmd.run import NotFinite
from dmd.seeding import Stream

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "dmd-image-tokenizer"
IN_USE = 0.01
"""A code is in use if it stands for at least this part of what it would if all codes were used alike."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What a tokenizer is made of.

    Attributes:
        size: height and width of its images.
        sizes: of encoder and decoder.
        codes: how many there are.
        code_width: numbers in each.
        commitment: weight beta of the encoder's distance from its codes, |z - sg(code)|^2.
        decay: of the moving average that a code is.
        dead_below: average number of features of a batch under which a code is replaced; 0 never does.
    """

    size: int
    sizes: ConvSizes
    codes: int
    code_width: int
    commitment: float = 0.25
    decay: float = 0.99
    dead_below: float = 0.0

    @property
    def grid(self) -> int:
        """Rows, and columns, of an image's tokens."""
        return self.size // self.sizes.reduction

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.grid**2


class Tokenizer(nn.Module):
    """Images to tokens and back; fresh weights come from torch's global random state."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.config = config
        width = config.sizes.widths[-1]
        self.encoder, self.decoder = encoder(config.sizes), Decoder(config.sizes)
        # The package's beta is on the encoder's term; the codes are averages, so there is no other for it to slip to.
        self.quantizer: Any = VectorQuantize(
            dim=width,
            codebook_size=config.codes,
            codebook_dim=config.code_width,
            use_cosine_sim=True,
            decay=config.decay,
            commitment_weight=config.commitment,
            kmeans_init=True,
            threshold_ema_dead_code=config.dead_below,
            accept_image_fmap=True,
        )
        codebook = self.quantizer._codebook  # the package's own choice depends on the number of processes
        codebook.sample_fn = codebook.replace_sample_fn = chosen_features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) to their reconstructions, tokens (B, h, w), and the commitment loss.

        In training mode this also moves the codes.
        """
        features = self.encoder(images)
        codes, tokens, loss = self.quantizer(features.float())
        return self.decoder(codes), tokens, loss.sum()

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to tokens (B, length), int64, row by row."""
        with torch.no_grad():
            features = self.quantizer.project_in(self.encoder(images).float().flatten(2).transpose(1, 2))
            return (F.normalize(features, dim=-1) @ self.quantizer.codebook.T).argmax(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, length) to images (B, 3, H, W), float32, not clamped."""
        return self.draw(self.quantizer.codebook[tokens])

    def draw(self, codes: Tensor) -> Tensor:
        """Codes (B, length, code_width), or mixtures of them, to images; gradients pass."""
        grid = self.config.grid
        features = self.quantizer.project_out(codes).transpose(1, 2).unflatten(2, (grid, grid))
        return self.decoder(features).float()

    @property
    def codebook(self) -> Tensor:
        """(codes, code_width), each of length one."""
        return self.quantizer.codebook

    def use(self) -> tuple[Tensor, Tensor]:
        """Part of the codes that are in use by the moving average, and their perplexity as a part of all."""
        share = self.quantizer._codebook.cluster_size[0]
        share = share / share.sum().clamp_min(1e-12)
        perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
        return (share > IN_USE / len(share)).float().mean(), perplexity / len(share)


def chosen_features(features: Tensor, count: int) -> Tensor:
    """`count` of the features (1, N, D) that all processes have together: (1, count, D), the same in each process.

    Each once, if there are so many. Torch's generators must be at the same place in all processes.
    """
    whole = processes.collected(features[0])
    n, device = len(whole), whole.device
    enough = n >= count
    index = torch.randperm(n, device=device)[:count] if enough else torch.randint(n, (count,), device=device)
    return whole[index][None]


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's folder; the weights come last, so that a folder with them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / CONFIG, {"kind": KIND} | asdict(tokenizer.config))
    checkpoint.save_weights(tokenizer, folder / WEIGHTS)


def load(folder: str | Path, device: torch.device) -> Tokenizer:
    """A tokenizer, frozen.

    Raises:
        InputError: the folder holds none, or a damaged one.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw.pop("kind") != KIND:
            raise ValueError
        found = Tokenizer(TokenizerConfig(**raw | {"sizes": sizes_from(raw["sizes"])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{folder} is not the folder of an image tokenizer: it needs {CONFIG} of {KIND}") from None
    checkpoint.load_weights(found, folder / WEIGHTS)
    return found.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------- training

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images to a distance each, (B,)."""
Update = Callable[[Sequence[nn.Parameter], float, dict[str, Tensor]], Tensor]
"""Average, clip and check gradients: (parameters, max_norm, losses) to the norm; raises NotFinite for a bad update."""


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(x_hat)) / 2 of scores of any shape (VQGAN's hinge loss)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-4) at the decoder's last weights, at most 1e4 (VQGAN, eq. 7).

    The gradients are those of the mean over all processes, each of which gives the mean over its part of the batch.
    """
    ours, theirs = (
        (processes.total(torch.autograd.grad(loss, last, retain_graph=True)[0]) / processes.world()).norm()
        for loss in (reconstruction, adversarial)
    )
    return (ours / (theirs + 1e-4)).clamp(0.0, 1e4)


@dataclass(frozen=True)
class Adversary:
    """The discriminator's part in training.

    Attributes:
        net: images (B, 3, H, W) to scores.
        optimizer: of `net`.
        weight: of the adversarial term, times `adaptive_weight`.
        first: the step at which term and discriminator begin.
    """

    net: nn.Module
    optimizer: Optimizer
    weight: float
    first: int


class Tokenizing:
    """A `dmd.run.Task`: one update of a tokenizer a step, and of its discriminator once that has begun.

    loss = mean |x - x_hat| + perceptual_weight * distance(x_hat, x) + beta |z - sg(code)|^2
           + weight * adaptive_weight * (-mean D(x_hat))

    Both networks' gradients are computed and checked before either is updated.

    Args:
        tokenizer: what is trained.
        distance: perceptual, per image.
        adversary: None leaves the adversarial term out.
        max_norm: gradients are clipped to it.
        update: see `Update`.
        seed: keys what the quantizer draws, which is the same in all processes.
        autocast: dtype of the convolutions' arithmetic.
    """

    def __init__(
        self, tokenizer: Tokenizer, optimizer: Optimizer, distance: Distance, perceptual_weight: float,
        adversary: Adversary | None, max_norm: float, update: Update, seed: int,
        autocast: torch.dtype | None = None,
    ):  # fmt: skip
        self.tokenizer = tokenizer.train()
        self.optimizer = optimizer
        self.distance = distance
        self.perceptual_weight = perceptual_weight
        self.adversary = adversary
        self.max_norm = max_norm
        self.update = update
        self.seed = seed
        self.autocast = autocast

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"net": self.tokenizer}
        return found | ({"discriminator": self.adversary.net} if self.adversary else {})

    def optimizers(self) -> dict[str, Optimizer]:
        found = {"net": self.optimizer}
        return found | ({"discriminator": self.adversary.optimizer} if self.adversary else {})

    def step(self, step: int, batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """One update on micro-batches of images (B, 3, H, W). Raises `NotFinite` before a bad one."""
        adversary = self.adversary if self.adversary and step >= self.adversary.first else None
        codes = [b.detach().clone() for b in self.tokenizer.quantizer.buffers()]
        try:
            figures, rebuilt = self._tokenizer_gradients(step, batches, adversary)
            figures["grad/net"] = self.update(list(self.tokenizer.parameters()), self.max_norm, figures)
            if adversary:
                figures |= self._discriminator_gradients(adversary, batches, rebuilt)
                parameters = list(adversary.net.parameters())
                figures["grad/discriminator"] = self.update(parameters, self.max_norm, figures)
        except NotFinite:  # the codes have moved in the forward pass already
            with torch.no_grad():
                for buffer, before in zip(self.tokenizer.quantizer.buffers(), codes, strict=True):
                    buffer.copy_(before)
            raise
        self.optimizer.step()
        if adversary:
            adversary.optimizer.step()
        figures["codebook/use"], figures["codebook/perplexity"] = self.tokenizer.use()
        return self._complete(figures, batches[0].device)

    def _complete(self, figures: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Every step reports the same names, also before the discriminator begins."""
        if not self.adversary:
            return figures
        names = ("loss/adversarial", "loss/discriminator", "health/adaptive_weight", "grad/discriminator")
        return dict.fromkeys(names, torch.zeros((), device=device)) | figures

    def _tokenizer_gradients(
        self, step: int, batches: Sequence[Tensor], adversary: Adversary | None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        self.optimizer.zero_grad()
        figures: dict[str, Tensor] = {}
        rebuilt = []
        for k, x in enumerate(batches):
            draw = step * len(batches) + k
            with (
                pinned(self.seed, Stream.CODE_REPLACEMENT, draw, 0, x.device),
                torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None),
            ):
                found, _, commitment = self.tokenizer(x)
            found = found.float()
            l1, perceptual = (found - x).abs().mean(), self.distance(found, x).mean()
            reconstruction = l1 + self.perceptual_weight * perceptual
            loss = reconstruction + commitment
            part = {"loss/l1": l1, "loss/perceptual": perceptual, "loss/commitment": commitment}
            if adversary:
                term = -adversary.net(found).mean()
                weight = adaptive_weight(reconstruction, term, self.tokenizer.decoder.last.weight)
                loss = loss + adversary.weight * weight * term
                part |= {"loss/adversarial": term, "health/adaptive_weight": weight}
            (loss / len(batches)).backward()
            rebuilt.append(found.detach())
            for name, value in part.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / len(batches)
        return figures, rebuilt

    def _discriminator_gradients(
        self, adversary: Adversary, batches: Sequence[Tensor], rebuilt: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        adversary.optimizer.zero_grad()  # also of what the adversarial term has left there
        total = torch.zeros((), device=batches[0].device)
        for x, fake in zip(batches, rebuilt, strict=True):
            loss = hinge_discriminator_loss(adversary.net(x), adversary.net(fake)) / len(batches)
            loss.backward()
            total = total + loss.detach()
        return {"loss/discriminator": total}
