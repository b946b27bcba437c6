"""Captions by a causal language model that is shown three examples, as SynCLR does with Llama-2 (arXiv 2312.17742).

The examples below were written for this project. The model continues "concept, background =>" after three random ones
of the template (temperature 0.8, nucleus 0.9, at most 100 tokens), and its first line is the caption.

Tokens are drawn from `dmd.seeding`, so a caption depends on the seed and its own attempt, not on its batch, up to the
rounding of the model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd.captions.concepts import Concepts
from dmd.captions.grammar import Draw, Idea, Row, Template, idea
from dmd.captions.mixture import Mixture
from dmd.errors import InputError
from dmd.seeding import Stream, as_uniform, bits

TEMPERATURE, NUCLEUS, MAX_TOKENS = 0.8, 0.9, 100
SHOWN = 3  # examples
MIN_LENGTH, MAX_LENGTH = 8, 300  # characters of a caption

HEADERS: dict[Template, str] = {
    "concept": "Generate an image description with an object category:",
    "relation": "Generate an image description with an object category and a relation:",
    "background": "Generate an image description with an object category and an environment category:",
    "place": "Generate an image description with an environment category:",
    "texture": "Generate an image description with a texture category:",
}

EXAMPLES: dict[Template, tuple[tuple[str, str], ...]] = {
    "concept": (
        ("tabby cat", "A tabby cat stretches after a nap, its striped tail held high."),
        ("acoustic guitar", "A worn acoustic guitar leans against an old armchair."),
        ("steam locomotive", "A black steam locomotive pulls out of the station in a cloud of white steam."),
        ("teapot", "Steam curls from the spout of a blue porcelain teapot."),
        ("barn owl", "A barn owl turns its pale face towards the camera."),
        ("bicycle", "A red bicycle with a wicker basket stands locked to a railing."),
        ("mushroom", "A single brown mushroom pushes up through wet leaves."),
        ("typewriter", "A vintage typewriter with a half-finished page still in it."),
        ("sailing boat", "A small sailing boat heels over in a strong wind."),
        ("cheese pizza", "A cheese pizza with a blistered crust, fresh from the oven."),
        ("sunflower", "A sunflower in full bloom faces the afternoon sun."),
        ("pocket watch", "An open silver pocket watch shows a quarter past nine."),
    ),
    "relation": (
        ("golden retriever, next to", "A golden retriever sits next to a pair of muddy boots."),
        ("laptop, on", "A laptop lies open on a pile of newspapers."),
        ("red fox, behind", "A red fox peers out from behind a fallen log."),
        ("umbrella, over", "A bright yellow umbrella is held over a sleeping child."),
        ("bucket, under", "A metal bucket stands under a dripping tap."),
        ("kite, above", "A diamond-shaped kite flies high above the dunes."),
        ("goldfish, in", "A goldfish circles slowly in a round glass bowl."),
        ("tractor, in front of", "A green tractor is parked in front of a wooden barn."),
        ("rug, below", "A patterned rug lies below a low glass table."),
        ("candle, beside", "A burning candle stands beside a stack of letters."),
    ),
    "background": (
        ("penguin, on a rocky shore", "A lone penguin waddles along a rocky shore as waves break behind it."),
        ("espresso machine, on a kitchen counter", "An espresso machine gleams on a tidy kitchen counter."),
        ("zebra, in tall grass", "A zebra lifts its head from the tall grass, ears pricked."),
        ("violin, by a window", "A violin rests on a chair by a window with rain on the glass."),
        ("pickup truck, on a dirt road", "A dusty pickup truck rattles down a dirt road between fields."),
        ("tulip, in a glass vase", "One pink tulip droops over the edge of a glass vase."),
        ("hamburger, on a wooden board", "A hamburger with melting cheese is served on a wooden board."),
        ("biplane, against a sunset", "A biplane is a dark outline against an orange sunset."),
        ("bookcase, in a dimly lit room", "A tall bookcase fills the wall of a dimly lit room."),
        ("husky, in a snowy field", "A husky bounds through a snowy field with its tongue out."),
    ),
    "place": (
        ("harbour", "Fishing boats crowd a small harbour at low tide."),
        ("library", "Long tables and green lamps in a quiet library."),
        ("bamboo forest", "A narrow path winds through a dense bamboo forest."),
        ("railway station", "Travellers wait under the iron roof of a railway station."),
        ("canyon", "Evening light reddens the walls of a deep canyon."),
        ("bakery", "Rows of fresh loaves behind the glass of a small bakery."),
    ),
    "texture": (
        ("knitted", "A close view of knitted wool in thick grey stitches."),
        ("cracked", "Dry earth, cracked into a pattern of small plates."),
        ("polka-dotted", "A polka-dotted fabric, white on navy blue."),
        ("marbled", "Swirls of ink on a sheet of marbled paper."),
        ("woven", "A woven basket seen from so near that only the cane shows."),
    ),
}


class LanguageModel:
    """A causal language model and its tokenizer, on a device.

    Args:
        source: a folder, or an id on the hub; safetensors only, and no code of its own is run.

    Raises:
        InputError: it cannot be had, or is no causal language model.
    """

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if Path(source).exists() and not (Path(source) / "config.json").is_file():
            raise InputError(f"--llm is {source}, which has no config.json: give the folder of a causal language model")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"--llm is {source}, which cannot be loaded as a causal language model: {first}") from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device
        ends = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
        self._ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})

    def continuations(self, prompts: Sequence[str], seed: int, index: Tensor) -> list[tuple[str, bool]]:
        """What the model says after each prompt, up to a line feed, and whether it came to an end by itself.

        Args:
            index: (B,) int64, the number of each attempt, from which its tokens are drawn.
        """
        from transformers import LogitsProcessor, LogitsProcessorList

        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        inputs = {k: inputs[k].to(self.device) for k in ("input_ids", "attention_mask")}
        length = inputs["input_ids"].shape[1]
        room = getattr(self.model.config, "max_position_embeddings", None) or length + MAX_TOKENS
        if length >= room:
            raise InputError(
                f"--llm has a context of {room} tokens, and three examples take {length}: give another model"
            )

        class Drawn(LogitsProcessor):
            """Leaves one token, drawn from the logits."""

            def __call__(self, input_ids: Any, scores: Any) -> Any:
                word = bits(seed, Stream.CAPTION_TOKEN, input_ids.shape[1] - length, index, 1)[:, 0]
                token = draw_token(scores.float(), as_uniform(word).to(scores.device))
                return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

        with torch.no_grad():
            out = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=min(MAX_TOKENS, room - length),
                eos_token_id=self._ends or None, pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([Drawn()]),
            )  # fmt: skip
        new = out[:, length:]
        ended = torch.isin(new, torch.tensor(self._ends, device=new.device)).any(1).tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.split("\n")[0].strip(), end) for text, end in zip(texts, ended, strict=True)]


def draw_token(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) from logits (B, V) by temperature and nucleus sampling, at the point `uniform` (B,) of each
    cumulative distribution (Holtzman et al. 2020, arXiv 1904.09751)."""
    probability, order = torch.sort((logits / TEMPERATURE).softmax(-1), descending=True, stable=True)
    below = probability.cumsum(-1) - probability  # of all that are likelier
    kept = probability * (below < NUCLEUS)
    edge = kept.cumsum(-1)
    place = (edge <= uniform[:, None] * edge[:, -1:]).sum(-1)
    return order.gather(1, place.clamp_max(logits.shape[1] - 1)[:, None])[:, 0]


def captions(model: LanguageModel, concepts: Concepts, mixture: Mixture, seed: int) -> Draw:
    """Captions by a language model; bad lines become the reason why."""

    def draw(attempts: Tensor) -> list[Row | str]:
        about = [idea(concepts, mixture, words) for words in bits(seed, Stream.CAPTION, 0, attempts, 7).tolist()]
        shown = bits(seed, Stream.CAPTION_EXAMPLES, 0, attempts, SHOWN).tolist()
        asked = [prompt(what, words) for what, words in zip(about, shown, strict=True)]
        said = model.continuations(asked, seed, attempts)
        return [
            fault(text, ended) or Row(text, what.concept, what.template)
            for what, (text, ended) in zip(about, said, strict=True)
        ]

    return draw


def prompt(what: Idea, words: Sequence[int]) -> str:
    """The header, three different examples by three random words, and the question."""
    left, examples = list(EXAMPLES[what.template]), []
    for word in words:
        examples.append(left.pop(len(left) * word >> 32))
    lines = [f"{given} => {caption}" for given, caption in examples]
    question = f"{what.concept}, {what.detail}" if what.detail else what.concept
    return "\n".join([HEADERS[what.template], *lines, f"{question} =>"])


def fault(text: str, ended: bool) -> str | None:
    """Why a line is no caption, in a word or two."""
    if not ended:
        return "unfinished"
    if len(text) < MIN_LENGTH or " " not in text:
        return "too short"
    if len(text) > MAX_LENGTH:
        return "too long"
    if "=>" in text or not text.isprintable() or "\ufffd" in text:
        return "garbled"
    return None
