"""Templates, labels, packing: what the model is shown and what it is trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, OPTConfig, PreTrainedTokenizerFast

from hydraserve.errors import ConfigError
from hydraserve.training.batches import PackedCollator, PaddedCollator, accepts_short_logits, keeps_examples_apart, pack
from hydraserve.training.data import Example, Turn
from hydraserve.training.template import IGNORE, Template, Tokens


def conversation(*texts: str, system: str | None = None) -> Example:
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Example((*([Turn("system", system)] if system else []), *turns), "test")


def trained_text(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> str:
    return tokenizer.decode([label for label in tokens.labels if label != IGNORE])


@pytest.mark.parametrize(
    ("name", "whole", "trained"),
    [
        ("plain", "sys\nask\nyes</s>more\nno</s>", "yes</s>no</s>"),
        ("chat", "<system>sys</s>\n<user>ask</s>\n<assistant>yes</s>\n<user>more</s>\n<assistant>no</s>\n", None),
        ("alpaca", None, "yes</s>no</s>"),
    ],
)
def test_only_answers_are_trained(
    tokenizer: PreTrainedTokenizerFast, name: str, whole: str | None, trained: str | None
) -> None:
    tokens = Template(name, tokenizer).tokens(conversation("ask", "yes", "more", "no", system="sys"), 999)
    text = tokenizer.decode(tokens.ids)
    if whole is not None:
        assert text == whole
    else:
        assert text.endswith(
            "### Instruction:\nask\n\n### Response:\nyes</s>### Instruction:\nmore\n\n### Response:\nno</s>"
        )
    expected = trained if trained is not None else ("<assistant>yes</s>\nno</s>\n").removeprefix("<assistant>")
    assert trained_text(tokenizer, tokens) == expected
    assert all(label in (IGNORE, i) for i, label in zip(tokens.ids, tokens.labels, strict=True))


def with_merges(merges: list[tuple[str, str]], **options: object) -> PreTrainedTokenizerFast:
    """One token a character of ASCII (the line break is "Ċ"), one for each merge, and an end of text."""
    characters = ["</s>", "<s>", "▁", "\n", *pre_tokenizers.ByteLevel.alphabet(), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(characters)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", **options)


def trained_after(tokens: Tokens, prompt: list[int]) -> list[int]:
    """The trained tokens that follow a prompt as it is served."""
    assert tokens.ids[: len(prompt)] == prompt
    rest = tokens.labels[len(prompt) :]
    return rest[: [*rest, IGNORE].index(IGNORE)]


def test_prompts_have_the_ids_with_which_they_are_served() -> None:
    tokenizer = with_merges([("Ċ", "Ċ"), ("s", "Ċ")])
    template = Template("alpaca", tokenizer)
    tokens = template.tokens(conversation("ask", "yes", "more", "\nno", system="Be kind."), 999)
    start = "Be kind.\n\n### Instruction:\nask\n\n### Response:\n"
    assert tokenizer.convert_ids_to_tokens(trained_after(tokens, tokenizer(start)["input_ids"])) == [*"yes", "</s>"]
    served = tokenizer(f"{start}yes</s>### Instruction:\nmore\n\n### Response:\n")["input_ids"]
    # Not the token of two line breaks: the prompt's last one is there before the answer begins.
    assert tokenizer.convert_ids_to_tokens(trained_after(tokens, served)) == ["Ċ", *"no", "</s>"]


def test_answers_get_no_space_that_the_text_has_not() -> None:
    tokenizer = with_merges([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert tokenizer.convert_ids_to_tokens(tokenizer("yes")["input_ids"]) == ["▁", *"yes"]
    tokens = Template("plain", tokenizer).tokens(conversation("ask", "yes"), 999)
    answer = trained_after(tokens, tokenizer("ask\n")["input_ids"])
    assert tokenizer.convert_ids_to_tokens(answer) == [*"yes", "</s>"]


def test_start_of_text_comes_once_from_template_or_tokenizer() -> None:
    chat = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer = with_merges([], chat_template=chat)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for name in ("chat", "plain"):
        ids = Template(name, tokenizer).tokens(conversation("ask", "yes"), 999).ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{% endfor %}",
            "TemplateError: no system role",
        ),
        ("{{ messages | length }}", "a chat template that rewrites earlier messages"),
    ],
)
def test_chat_templates_that_fail_name_the_example(chat: str, message: str) -> None:
    template = Template("chat", with_merges([], chat_template=chat))
    with pytest.raises(ConfigError, match=f"^test: template chat: got {message}"):
        template.tokens(conversation("ask", "yes", system="sys"), 999)


def test_cut_at_max_length(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = Template("plain", tokenizer).tokens(conversation("abc", "defgh"), 6)
    assert (tokenizer.decode(tokens.ids), trained_text(tokenizer, tokens)) == ("abc\nde", "de")


def test_template_that_cannot_be(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="template: got vicuna, expected one of chat, alpaca, plain"):
        Template("vicuna", tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ConfigError, match="without a chat template"):
        Template("chat", bare)


def test_an_end_of_text_that_is_not_read_as_one(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    bare.split_special_tokens = True
    with pytest.raises(ConfigError, match="tokenizer: got an end of text that it does not read as one token"):
        Template("plain", bare)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="tokenizer: got no end-of-text token"):
        Template("plain", bare)


def random_tokens(count: int, longest: int) -> list[Tokens]:
    rng = random.Random(0)
    result = []
    for _ in range(count):
        ids = [rng.randrange(1, 200) for _ in range(rng.randint(3, longest))]
        prompt = rng.randint(1, len(ids) - 1)
        result.append(Tokens(ids, [IGNORE] * prompt + ids[prompt:]))
    return result


def test_pack_keeps_every_example_whole_and_fills_rows() -> None:
    examples = random_tokens(500, 20)
    rows = pack(examples, 64, seed=1)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    lengths = [sum(len(e.ids) for e in row) for row in rows]
    assert max(lengths) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.95
    assert pack(examples, 64, seed=1) == rows
    assert pack(examples, 64, seed=2) != rows


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    model.config.use_cache = False  # with a cache, transformers does not look for the borders of packed examples
    return model


def mean_loss(model: LlamaForCausalLM, examples: list[Tokens]) -> torch.Tensor:
    """Each example alone, mean over all trained tokens."""
    total = sum(
        model(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss * e.trained for e in examples
    )
    return total / sum(e.trained for e in examples)


@pytest.mark.parametrize("short_logits", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_batches_give_the_loss_of_the_examples_alone(model: LlamaForCausalLM, packed: bool, short_logits: bool) -> None:
    examples = random_tokens(9, 12)
    collator = PackedCollator(short_logits=short_logits) if packed else PaddedCollator(0, short_logits=short_logits)
    batch = collator(pack(examples, 40, seed=0))
    assert accepts_short_logits(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, mean_loss(model, examples))
    assert batch["input_ids"].shape[0] == (1 if packed else 9)


SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEAKING = {
    "opt": OPTConfig(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, **SMALL),
    "mamba": MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, initializer_range=0.2),
}


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_do_not_keep_packed_examples_apart_are_found(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaking = AutoModelForCausalLM.from_config(LEAKING[name]).to(dtype)
    leaking.config.use_cache = False
    assert not keeps_examples_apart(leaking, random_tokens(2, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_packed_examples_apart(tiny_model: Path, dtype: torch.dtype) -> None:
    apart = LlamaForCausalLM.from_pretrained(tiny_model, dtype=dtype).train()
    apart.config.use_cache = False
    examples = random_tokens(2, 12)
    assert keeps_examples_apart(apart, examples)
    assert apart.training
    apart.config.use_cache = True  # transformers then looks for no borders
    assert not keeps_examples_apart(apart, examples)


def test_short_logits_leave_out_the_prompts(model: LlamaForCausalLM) -> None:
    example = Tokens([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8])
    batch = PaddedCollator(0, short_logits=True)([[example]])
    assert batch["logits_to_keep"].tolist() == [1, 2]
    assert batch["shift_labels"].tolist() == [[7, 8]]
    assert model(**batch).logits.shape[:2] == (1, 2)
    assert not accepts_short_logits(torch.nn.Linear(2, 2))
