"""Captions by a language model: a tiny one is built here whose every continuation is known in distribution."""

import json
import math
from collections import Counter

import pytest
import torch

from dmd.captions import concepts, grammar, language, store
from dmd.captions.mixture import Mixture
from dmd.cli import captions as command
from dmd.errors import InputError

transformers = pytest.importorskip("transformers")

SENTENCES = [caption for shown in language.EXAMPLES.values() for _, caption in shown]


def tokenizer():
    """One token a byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def bigrams(tokens):
    """log P(next byte | byte) of the example sentences, each between a space and a line feed."""
    counts = Counter(pair for s in SENTENCES for pair in zip(f" {s}", f"{s}\n", strict=True))
    size = len(tokens)
    table = torch.full((size, size), -60.0)
    for (a, b), n in counts.items():
        table[tokens.encode(a)[0], tokens.encode(b)[0]] = math.log(n)
    start = tokens.encode(">")[0]  # what the prompts end with
    table[start] = -60.0
    table[start, tokens.encode(" ")[0]] = 0.0
    return table.log_softmax(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GPT-2 whose blocks do nothing: the logits are a table of bigrams of the last byte."""
    path, tokens = tmp_path_factory.mktemp("llm"), tokenizer()
    size = len(tokens)
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=1024, n_embd=size, n_layer=1, n_head=1, tie_word_embeddings=False,
        bos_token_id=size - 1, eos_token_id=size - 1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        mean, std = 1 / size, math.sqrt(1 / size - 1 / size**2)
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.transformer.ln_f.weight.fill_(std)  # undoes the normalisation of a one-hot vector
        model.transformer.ln_f.bias.fill_(mean)
        model.lm_head.weight.copy_(bigrams(tokens).T)
    model.save_pretrained(path)
    tokens.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return language.LanguageModel(str(folder), torch.device("cpu"), torch.float32)


def test_the_model_says_what_its_table_says(model):
    """Every pair of letters is one of the sentences', also where prompts of a batch differ in length."""
    pairs = {pair for s in SENTENCES for pair in zip(f" {s}", f"{s}\n", strict=True)}
    said = model.continuations(["a =>", "something longer =>"] * 20, 0, torch.arange(40))
    ended = [text for text, end in said if end]
    assert 10 < len(ended) <= 40 and len(set(ended)) > 8
    for text in ended:
        # white space at the ends is cut off: look at what is between
        assert "\n" not in text and all(p in pairs for p in zip(text, text[1:], strict=False))
        assert text == "" or (text[-1], "\n") in pairs


def test_a_caption_depends_on_seed_and_attempt_alone(model):
    prompts = [f"{'x' * i} =>" for i in range(6)]
    together = model.continuations(prompts, 3, torch.arange(10, 16))
    apart = [model.continuations([p], 3, torch.tensor([10 + i]))[0] for i, p in enumerate(prompts)]
    assert together == apart
    assert model.continuations(prompts, 4, torch.arange(10, 16)) != together


def test_tokens_are_drawn_from_the_nucleus_at_its_temperature():
    """Against probabilities by hand: softmax(logits / 0.8), the fewest that reach 0.9, normalised again."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    p = [math.exp(v / 0.8) for v in logits.tolist()]
    p = [v / sum(p) for v in p]
    kept = [p[0], p[1], p[2]]  # 0.68, 0.19, 0.10: two of them have 0.87
    assert p[0] + p[1] < 0.9 < sum(kept)
    count = 20_000
    uniform = (torch.arange(count) + 0.5) / count
    found = Counter(language.draw_token(logits.expand(count, -1), uniform).tolist())
    assert found.keys() == {0, 1, 2}
    for token, part in enumerate(kept):
        assert found[token] / count == pytest.approx(part / sum(kept), abs=2e-4)
    edges = language.draw_token(logits.expand(2, -1), torch.tensor([2.0**-24, 1 - 2.0**-24]))
    assert edges.tolist() == [0, 2]


def test_prompts_have_three_different_examples_of_their_template():
    for template, shown in language.EXAMPLES.items():
        what = grammar.Idea(template, "owl", "on a roof" if template in ("relation", "background") else "")
        for words in ([0, 0, 0], [2**32 - 1] * 3, [2**31, 5, 2**30]):
            lines = language.prompt(what, words).split("\n")
            assert lines[0] == language.HEADERS[template] and len(lines) == 5 and len(set(lines[1:4])) == 3
            assert all(tuple(line.split(" => ")) in shown for line in lines[1:4])
            assert lines[4] == ("owl, on a roof =>" if what.detail else "owl =>")


def test_examples_are_captions_by_our_own_rule():
    for shown in language.EXAMPLES.values():
        for given, caption in shown:
            assert language.fault(caption, True) is None and "=>" not in given
            assert "," not in given or len(given.split(", ")) == 2


@pytest.mark.parametrize(
    ("text", "ended", "why"),
    [("A fine caption.", False, "unfinished"), ("", True, "too short"), ("oneword_only", True, "too short"),
     ("x " * 200, True, "too long"), ("a => b or so", True, "garbled"), ("a \ufffd in here", True, "garbled"),
     ("a\tb is here", True, "garbled"), ("A fine caption.", True, None)],
)  # fmt: skip
def test_bad_lines_have_a_reason(text, ended, why):
    assert language.fault(text, ended) == why


def test_the_command_writes_captions_and_goes_on_exactly(folder, tmp_path, capsys):
    """Stopped after 6 captions and continued to 20, against 20 at once."""
    flags = ["--llm", str(folder), "--llm-precision", "fp32", "--batch-size", "8", "--device", "cpu"]
    command.main(["--out", str(tmp_path / "a.jsonl"), "--count", "20", *flags])
    assert "20 captions (" in capsys.readouterr().out
    command.main(["--out", str(tmp_path / "b.jsonl"), "--count", "6", *flags])
    command.main(["--out", str(tmp_path / "b.jsonl"), "--count", "20", *flags])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({r["caption"] for r in rows}) == 20 and all(language.fault(r["caption"], True) is None for r in rows)
    known = {c for g in concepts.shipped().groups for c in g.concepts} | set(concepts.shipped().places)
    assert {r["concept"] for r in rows} <= known
    state = json.loads(store.state_of(tmp_path / "a.jsonl").read_text())["progress"]
    assert state["attempts"] == 20 + sum(state["dropped"].values()) and state["dropped"]


def test_ideas_are_those_of_the_templates(model):
    found = language.captions(model, concepts.shipped(), Mixture(), 0)(torch.arange(6))
    wanted = grammar.templates(concepts.shipped(), Mixture(), 0)(torch.arange(6))
    for row, plain in zip(found, wanted, strict=True):
        assert isinstance(row, str) or (row.concept, row.template) == (plain.concept, plain.template)


def test_what_is_no_language_model_gets_a_sentence(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no config.json"):
        language.LanguageModel(str(tmp_path / "empty"), torch.device("cpu"), torch.float32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        language.LanguageModel(str(tmp_path / "other"), torch.device("cpu"), torch.float32)
    (tmp_path / "pickle").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickle" / name).write_bytes((folder / name).read_bytes())
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        language.LanguageModel(str(tmp_path / "pickle"), torch.device("cpu"), torch.float32)


def test_a_context_that_is_too_small_is_said(model):
    with pytest.raises(InputError, match="context of 1024 tokens, and three examples take"):
        model.continuations(["x" * 1100 + " =>"], 0, torch.arange(1))
