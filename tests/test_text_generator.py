"""A network and its vocabulary: text in, text out, from a checkpoint alone."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from chargpt.checkpoints import CheckpointError
from chargpt.generation import GenerationConfig
from chargpt.model import GPT, GPTConfig
from chargpt.text_generator import MAX_ROWS, TextGenerator, load
from chargpt.vocabulary import UnknownCharacterError, Vocabulary

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
    """A checkpoint as training leaves it."""
    checkpoint = dict(
        vocabulary=generator.vocabulary.characters,
        state_dict={f"gpt.{name}": weight for name, weight in generator.gpt.state_dict().items()},
        hyper_parameters=dict(SIZES, dropout=0.2, lr=1e-3, seed=1),
        datamodule_hyper_parameters={},
        global_step=5,
    )
    torch.save(checkpoint | changes, path)
    return str(path)


# ---- writing ----


def test_complete_is_the_prompt_and_what_stream_gives():
    generator = make_generator()
    text = generator.complete("abc", max_new_chars=40, seed=3)
    pieces = list(generator.stream("abc", max_new_chars=40, seed=3))
    assert text == "abc" + "".join(pieces)
    assert len(text) == 43 and [len(piece) for piece in pieces] == [1] * 40
    assert text != generator.complete("abc", max_new_chars=40, seed=4)


def test_the_first_characters_come_before_the_last_are_written():
    stream = make_generator().stream("abc", max_new_chars=10**9)
    assert len(next(stream) + next(stream)) == 2


def test_samples_and_prompts_are_the_same_in_any_company():
    generator = make_generator()
    prompts = ["abc", "a", "", "fade a bead\ncafé"]
    three = generator.complete_all(prompts, num_samples=3, max_new_chars=30, seed=5)
    seven = generator.complete_all(prompts[::-1], num_samples=7, max_new_chars=30, seed=5)[::-1]
    for prompt, few, many in zip(prompts, three, seven):
        assert few == many[:3] and len(set(many)) > 1
        assert few[0] == generator.complete(prompt, max_new_chars=30, seed=5)


def test_more_texts_than_fit_in_one_batch():
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


def test_a_stop_string_in_the_prompt_does_not_count():
    generator = make_generator()
    first = generator.complete("aaa", max_new_chars=1)[3]
    other = next(c for c in CHARACTERS if c != first)
    assert generator.complete(
        other, max_new_chars=1, stop=[other + generator.complete(other, max_new_chars=1)[1]]
    ) == (generator.complete(other, max_new_chars=1))


@torch.no_grad()
def test_the_exact_window_slides():
    generator = make_generator(position="rotary")
    ids = generator.encode("abc")
    for _ in range(40):
        ids.append(generator.gpt(torch.tensor([ids[-8:]]))[0, -1].argmax().item())
    text = "".join(CHARACTERS[id] for id in ids)
    settings = dict(max_new_chars=40, temperature=0)
    assert (
        generator.complete("abc", exact_window=True, **settings)
        == text
        != generator.complete("abc", **settings)
    )


def test_an_empty_prompt_starts_from_a_newline_or_from_the_first_character():
    generator = make_generator()
    assert generator.complete("", max_new_chars=20) == generator.complete("\n", max_new_chars=20)
    generator = make_generator("abcdefghi")
    assert generator.complete("", max_new_chars=20) == generator.complete("a", max_new_chars=20)


def test_unknown_characters_are_named_before_anything_is_written():
    generator = make_generator()
    for prompt, stop, name in [("Abc", [], "'A'"), ("abc", ["x"], "'x'")]:
        with pytest.raises(UnknownCharacterError, match=name):
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
def test_settings_that_mean_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**wrong)
    with pytest.raises(ValueError, match=message):
        make_generator().stream("a", **wrong)


def test_a_network_without_numbers_says_so():
    generator = make_generator().to("meta")
    for use in (lambda: generator.complete("abc"), lambda: generator.score("abc")):
        with pytest.raises(ValueError, match="on the meta device"):
            use()


def test_nothing_to_write():
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
        start = (i - 1) // 8 * 8  # blocks of block_size, one after the other
        logits = generator.gpt(ids[None, start:i])[0, -1]
        expected.append(F.cross_entropy(logits, ids[i]))
    torch.testing.assert_close(score.losses, torch.stack(expected), rtol=0, atol=1e-5)
    assert score.nats == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert score.bits == pytest.approx(score.nats * 1.4426950408889634)


def test_score_in_training_is_without_dropout_and_changes_nothing():
    generator = make_generator(dropout=0.5)
    expected = generator.score("fade a bead")
    generator.train()
    assert torch.equal(generator.score("fade a bead").losses, expected.losses)
    assert all(module.training for module in generator.modules())


def test_score_of_too_short_a_text():
    with pytest.raises(ValueError, match="fewer than two"):
        make_generator().score("a")


# ---- checkpoints ----


def test_a_loaded_generator_writes_what_the_saved_one_did(tmp_path):
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


def test_every_switch_of_the_network_travels(tmp_path):
    switches = dict(position="rotary", norm="plain", bias=False, activation="relu2", ngrams={3: 7})
    saved = make_generator(**switches)
    path = save(tmp_path / "x.ckpt", saved, hyper_parameters=SIZES | switches)
    assert load(path).complete("abc", seed=2) == saved.complete("abc", seed=2)


def test_the_newest_runs_best_checkpoint_is_loaded_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        load()
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    save(folder / "step=5-val_loss=2.0000.ckpt", make_generator())
    save(folder / "last.ckpt", make_generator(CHARACTERS + "ö"))
    assert load().vocabulary.characters == CHARACTERS
    assert load("last").vocabulary.characters == CHARACTERS + "ö"


@pytest.mark.parametrize(
    "changes",
    [
        dict(vocabulary="ab"),
        dict(vocabulary="ba"),
        dict(state_dict={}),
        dict(hyper_parameters=dict(SIZES, n_embd=32)),
        dict(hyper_parameters=dict(SIZES, n_head=5)),
        dict(hyper_parameters=dict(SIZES, norm="unheard of")),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit(tmp_path, changes):
    path = save(tmp_path / "x.ckpt", make_generator(), **changes)
    with pytest.raises(CheckpointError, match="x.ckpt does not fit") as error:
        load(path)
    assert len(str(error.value).splitlines()) == 2


def test_writing_needs_no_training_code():
    program = (
        "import sys, chargpt.cli.predict\n"
        "print([name for name in ('lightning', 'pytorch_lightning', 'torchmetrics') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        == "[]\n"
    )
