"""TextGenerator: completing, streaming and scoring text, and loading a checkpoint."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from chargpt.checkpoints import checkpoint_of
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.text_generator import MAX_ROWS, TextGenerator, load
from chargpt.vocabulary import Vocabulary

CHARACTERS = "\n abcdefé"
SIZES = dict(block_size=8, n_embd=16, n_head=2, n_layer=2)


def make_generator(characters: str = CHARACTERS, **switches) -> TextGenerator:
    gpt = GPT(GPTConfig(**SIZES, **switches), len(characters))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return TextGenerator(gpt, Vocabulary(characters)).eval()


def save(path, generator: TextGenerator, **changes) -> str:
    """A checkpoint with this network, with some parts replaced."""
    gpt = generator.gpt
    torch.save(checkpoint_of(gpt.state_dict(), gpt.config, generator.vocabulary) | changes, path)
    return str(path)


# ---- generating ----


def test_complete_returns_the_prompt_and_all_chunks_of_stream():
    generator = make_generator()
    text = generator.complete("abc", max_new_chars=40, seed=3)
    chunks = list(generator.stream("abc", max_new_chars=40, seed=3))
    assert text == "abc" + "".join(chunks)
    assert len(text) == 43 and [len(chunk) for chunk in chunks] == [1] * 40
    assert text != generator.complete("abc", max_new_chars=40, seed=4)


def test_stream_returns_characters_before_all_are_generated():
    stream = make_generator().stream("abc", max_new_chars=10**9)
    assert len(next(stream) + next(stream)) == 2


def test_a_text_does_not_depend_on_the_rest_of_its_batch():
    generator = make_generator()
    prompts = ["abc", "a", "", "fade a bead\ncafé"]
    three = generator.complete_all(prompts, num_samples=3, max_new_chars=30, seed=5)
    seven = generator.complete_all(prompts[::-1], num_samples=7, max_new_chars=30, seed=5)[::-1]
    for prompt, few, many in zip(prompts, three, seven):
        assert few == many[:3] and len(set(many)) > 1
        assert few[0] == generator.complete(prompt, max_new_chars=30, seed=5)


def test_more_texts_than_one_batch_holds():
    generator = make_generator()
    texts = generator.complete_all(["a", "b"], num_samples=MAX_ROWS, max_new_chars=3)
    assert [len(samples) for samples in texts] == [MAX_ROWS, MAX_ROWS]
    assert (
        texts[1][-1] == generator.complete_all(["b"], num_samples=MAX_ROWS, max_new_chars=3)[0][-1]
    )


def test_stop_strings():
    generator = make_generator()
    text = generator.complete("abc", max_new_chars=200)[3:]
    stop = text[50:53]
    expected = text[: text.index(stop)]
    assert generator.complete("abc", max_new_chars=200, stop=[stop, "ffffff"]) == "abc" + expected
    assert generator.complete("abc", max_new_chars=200, stop=stop) == "abc" + expected
    assert generator.complete("abc", max_new_chars=200, stop=None) == "abc" + text
    assert "".join(generator.stream("abc", max_new_chars=200, stop=[stop])) == expected


def test_a_newline_in_a_stop_string_matches_cr_lf_too():
    """In a text with such line endings, where no newline follows another."""
    generator = make_generator("\n\rabc")
    settings = dict(max_new_chars=60, temperature=9.0)
    for seed in range(20):
        first, found, _ = generator.complete("a", seed=seed, **settings).partition("\r\n")
        if found and "\n" not in first:
            break
    assert found and "\n" not in first
    for stop in ("\n", "\r\n"):
        assert generator.complete("a", seed=seed, stop=stop, **settings) == first


def test_a_stop_string_that_starts_in_the_prompt_does_not_count():
    generator = make_generator()
    first = generator.complete("aaa", max_new_chars=1)[3]
    other = next(c for c in CHARACTERS if c != first)
    assert generator.complete(
        other, max_new_chars=1, stop=[other + generator.complete(other, max_new_chars=1)[1]]
    ) == (generator.complete(other, max_new_chars=1))


def test_an_empty_prompt_starts_from_a_newline_or_from_the_first_character():
    generator = make_generator()
    assert generator.complete("", max_new_chars=20) == generator.complete("\n", max_new_chars=20)
    generator = make_generator("abcdefghi")
    assert generator.complete("", max_new_chars=20) == generator.complete("a", max_new_chars=20)


def test_unknown_characters_raise_before_anything_is_generated():
    generator = make_generator()
    for prompt, stop, name in [("Abc", [], "'A'"), ("abc", ["x"], "'x'")]:
        with pytest.raises(UserError, match=name):
            generator.stream(prompt, stop=stop)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(max_new_chars=-1), "max_new_chars is -1"),
        (dict(stop=[""]), "stop string is empty"),
        (dict(stop=""), "stop string is empty"),
        (dict(temperature=-1), "temperature is -1"),
    ],
)
def test_invalid_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**wrong)
    with pytest.raises(UserError, match=message):
        make_generator().stream("a", **wrong)


def test_a_network_on_the_meta_device_raises():
    generator = make_generator().to("meta")
    for use in (lambda: generator.complete("abc"), lambda: generator.score("abc")):
        with pytest.raises(NotImplementedError, match="meta"):
            use()


def test_zero_new_characters():
    assert make_generator().complete("abc", max_new_chars=0) == "abc"


# ---- scoring ----


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 30, 8 * MAX_ROWS + 12])
@torch.no_grad()
def test_score_predicts_every_character_but_the_first_once(length):
    generator = make_generator()
    text = ("fade a bead\ncafé " * length)[:length]
    score = generator.score(text)

    ids = torch.tensor(generator.encode(text))
    expected = []
    for i in range(1, length):
        start = (i - 1) // 8 * 8  # consecutive sequences of block_size
        logits = generator.gpt(ids[None, start:i])[0, -1]
        expected.append(F.cross_entropy(logits, ids[i]))
    torch.testing.assert_close(score.losses, torch.stack(expected), rtol=0, atol=1e-5)
    assert score.nats == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert score.bits == pytest.approx(score.nats * 1.4426950408889634)


def test_score_is_without_dropout_and_restores_training_mode():
    generator = make_generator(dropout=0.5)
    expected = generator.score("fade a bead")
    generator.train()
    assert torch.equal(generator.score("fade a bead").losses, expected.losses)
    assert all(module.training for module in generator.modules())


def test_score_needs_two_characters():
    with pytest.raises(UserError, match="at least two characters"):
        make_generator().score("a")


# ---- checkpoints ----


def test_a_loaded_generator_gives_the_same_text_as_the_saved_one(tmp_path):
    saved = make_generator()
    state = torch.get_rng_state()
    generator = load(save(tmp_path / "x.ckpt", saved))
    assert torch.equal(torch.get_rng_state(), state)
    assert generator.complete("abc", seed=2) == saved.complete("abc", seed=2)
    assert not generator.training and not generator.gpt.training
    assert generator.vocabulary == saved.vocabulary and len(generator.vocabulary) == len(CHARACTERS)
    assert [p.data_ptr() for p in generator.parameters()] == [
        p.data_ptr() for p in generator.gpt.parameters()
    ]
    assert all(parameter.device.type == "cpu" for parameter in generator.parameters())


def test_all_settings_of_the_network_are_restored(tmp_path):
    switches = dict(position="rotary", norm="plain", bias=False, activation="relu2", ngrams={3: 7})
    saved = make_generator(**switches)
    path = save(tmp_path / "x.ckpt", saved)
    assert load(path).gpt.config == saved.gpt.config
    assert load(path).complete("abc", seed=2) == saved.complete("abc", seed=2)


def test_load_takes_the_best_checkpoint_of_the_newest_run_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run with a checkpoint"):
        load()
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    save(folder / "best.ckpt", make_generator())
    save(folder / "last.ckpt", make_generator(CHARACTERS + "ö"))
    assert load().vocabulary.characters == CHARACTERS
    assert load("last").vocabulary.characters == CHARACTERS + "ö"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocabulary="ab"), "x.ckpt: the weights do not fit the settings"),
        (dict(state_dict={}), "x.ckpt has"),
        (dict(hyper_parameters=dict(n_embd=32)), "x.ckpt: the weights do not fit the settings"),
        (dict(hyper_parameters=dict(n_head=5)), "n_head"),
        (dict(hyper_parameters=dict(norm="unknown")), "norm"),
    ],
    ids=str,
)
def test_a_checkpoint_whose_parts_do_not_match(tmp_path, changes, message):
    generator = make_generator()
    if "hyper_parameters" in changes:
        changes = dict(hyper_parameters=asdict(generator.gpt.config) | changes["hyper_parameters"])
    path = save(tmp_path / "x.ckpt", generator, **changes)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert len(str(error.value).splitlines()) <= 2
