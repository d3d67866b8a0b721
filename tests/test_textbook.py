"""The textbook script by itself, and the engine compared with it weight by weight."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from chargpt import explain, textbook
from chargpt.model import GPT, GPTConfig
from chargpt.textbook import BigramLangModel, Head

BASE = dict(block_size=256, n_embed=384, n_head=6, n_layer=6)
SMALL = dict(block_size=12, n_embed=24, n_head=3, n_layer=2)
TINY = dict(block_size=8, n_embed=16, n_head=2, n_layer=2, dropout=0.0)
TRAINING = dict(batch_size=4, epochs=60, lr=1e-2, eval_interval=30, eval_characters=64)
EXACT = dict(rtol=0, atol=1e-9)  # in float64, where two correct computations differ by much less


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def engine(vocab_size: int, block_size: int, n_embed: int, n_head: int, n_layer: int) -> GPT:
    config = GPTConfig(block_size, n_embd=n_embed, n_head=n_head, n_layer=n_layer, dropout=0.0)
    return GPT(config, vocab_size)


def engine_parameters(model: BigramLangModel) -> dict[str, list[torch.nn.Parameter]]:
    """The textbook parameters that form each engine parameter, concatenated row-wise."""
    names = {
        name: [parameter] for name, parameter in model.named_parameters() if ".heads." not in name
    }
    for i, block in enumerate(model.blocks):
        heads = block.attention.heads
        parts = [getattr(head, part) for part in ("query", "key", "value") for head in heads]
        names[f"blocks.{i}.attention.qkv.weight"] = [part.weight for part in parts]
    return names


@torch.no_grad()
def both_networks(sizes: dict, vocab_size: int = 65) -> tuple[BigramLangModel, GPT]:
    """Both networks in float64 with the same random weights, large enough for all parts to matter."""
    model = BigramLangModel(vocab_size, **sizes, dropout=0.0).double()
    gpt = engine(vocab_size, **sizes).double()
    for name, parameter in model.named_parameters():
        std = 1.0 if "embedding" in name else 0.3 if "bias" in name or "norm" in name else 0.0
        parameter.normal_(std=std or 2 * parameter.size(-1) ** -0.5)
    weights = {name: torch.cat(parts) for name, parts in engine_parameters(model).items()}
    gpt.load_state_dict(weights)
    return model, gpt


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(65, shape)


def run(monkeypatch, *arguments: str, script=textbook) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


# --- The engine computes what the textbook computes --------------------------------------------


@pytest.mark.parametrize("sizes", [BASE, SMALL], ids=["base", "small"])
def test_logits_loss_and_gradients_match_the_engine(sizes):
    model, gpt = both_networks(sizes)
    idx, targets = random_ids(1, sizes["block_size"]), random_ids(1, sizes["block_size"])
    logits, loss = model(idx, targets)
    engine_logits = gpt(idx)
    torch.testing.assert_close(engine_logits, logits, **EXACT)
    engine_loss = torch.nn.functional.cross_entropy(engine_logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(engine_loss, loss, **EXACT)

    loss.backward()
    engine_loss.backward()
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    for name, parts in engine_parameters(model).items():
        expected = torch.cat([part.grad for part in parts])
        torch.testing.assert_close(gradients[name], expected, **EXACT, msg=f"gradient of {name}")
        assert expected.abs().max() > 1e-5, f"{name}: a zero gradient would test nothing"


def test_short_inputs_in_a_batch_match_the_engine():
    model, gpt = both_networks(SMALL)
    idx = random_ids(3, 5)
    torch.testing.assert_close(gpt(idx), model(idx)[0], **EXACT)


# --- The model ---------------------------------------------------------------------------------


def test_default_hyperparameters_and_parameter_count():
    assert {name: getattr(textbook, name) for name in BASE} == BASE
    assert (textbook.batch_size, textbook.epochs, textbook.lr) == (64, 5000, 3e-4)
    assert textbook.dropout == 0.2
    assert sum(p.numel() for p in BigramLangModel(65).parameters()) == 10_788_929


def test_initial_loss_is_that_of_uniform_guessing():
    model = BigramLangModel(65).eval()
    with torch.no_grad():
        _, loss = model(random_ids(2, 256), random_ids(2, 256))
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)


def test_attention_by_hand():
    """Two positions, a head of two channels: the formula worked out on paper."""
    head = Head(2, n_embed=2, dropout=0.0)
    for layer, weight in ((head.query, 1.0), (head.key, 2.0), (head.value, 3.0)):
        layer.weight.data = weight * torch.eye(2)
    a, b = (1.0, 0.0), (0.5, 1.0)
    to_a, to_b = (math.exp(score / math.sqrt(2)) for score in (2 * 0.5, 2 * 1.25))
    weight_a = to_a / (to_a + to_b)
    expected = [[3.0, 0.0], [3 * weight_a + 1.5 * (1 - weight_a), 3 * (1 - weight_a)]]
    torch.testing.assert_close(head(torch.tensor([[a, b]])), torch.tensor([expected]))


@torch.no_grad()
def test_attention_is_causal():
    model, _ = both_networks(SMALL)
    idx = random_ids(1, 12)
    before, _ = model(idx)
    for position in (1, 6, 11):
        changed = idx.clone()
        changed[0, position] = (idx[0, position] + 1) % 65
        after, _ = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], **EXACT)
        assert (after - before)[:, position:].abs().amax(-1).min() > 1e-4


def test_dropout_is_active_only_in_training():
    model, idx = BigramLangModel(65, **SMALL, dropout=0.5), random_ids(2, 12)
    with torch.no_grad():
        model.head.weight.normal_()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_generate_keeps_the_prompt_and_continues_past_the_context():
    model, idx = BigramLangModel(65, **SMALL, dropout=0.0), random_ids(2, 3)
    longer = model.generate(idx, 20)
    assert longer.shape == (2, 23)
    assert torch.equal(longer[:, :3], idx)
    assert longer.max() < 65 and longer.min() >= 0


def test_generate_samples_from_the_predicted_distribution():
    model = BigramLangModel(3, **SMALL, dropout=0.0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    sampled = model.generate(torch.zeros(3000, 1, dtype=torch.long), 1)[:, 1]
    frequencies = torch.bincount(sampled, minlength=3) / 3000
    torch.testing.assert_close(frequencies, torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=0.04)


# --- The script --------------------------------------------------------------------------------


def test_prepare_encodes_and_splits_the_text(text):
    stoi, itos, data = textbook.prepare(text)
    assert textbook.decode(textbook.encode(text, stoi), itos) == text
    assert "".join(itos.values()) == "".join(sorted(set(text)))
    assert [len(data[split]) for split in ("train", "val")] == [1800, 200]
    for split, part in (("train", text[:1800]), ("val", text[1800:])):
        x, y = textbook.get_batch(data[split], 8, 4)
        assert x.shape == y.shape == (4, 8)
        for inputs, targets in zip(x.tolist(), y.tolist()):
            assert inputs[1:] == targets[:-1]
            assert textbook.decode([*inputs, targets[-1]], itos) in part


def test_loss_is_estimated_in_eval_mode(text):
    _, itos, data = textbook.prepare(text)
    model = BigramLangModel(len(itos), **TINY | dict(dropout=0.9))
    model.head.weight.data.normal_()
    modes = []
    model.register_forward_hook(lambda model, *_: modes.append(model.training))
    assert textbook.estimate_loss(model, data, 4, 64).keys() == {"train", "val"}
    assert modes == [False] * 4 and model.training


def test_the_command_trains_and_generates(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(textbook, "SMALL", TINY)
    monkeypatch.setattr(textbook, "SMALL_TRAINING", TRAINING)
    run(monkeypatch, tmp_path / "text.txt", "--small")
    out, err = capsys.readouterr()
    V = len(set(text))
    assert err == ""
    assert f"ln {V} = {math.log(V):.2f} nats" in out and "step    60" in out
    losses = [float(loss) for loss in re.findall(r"val (\d\.\d+)", out)]
    assert losses[0] == pytest.approx(math.log(V), abs=0.1) and losses[-1] < losses[0] - 0.5
    sample = out[out.index("step    60") :].split("\n", 1)[1].removesuffix("\n")
    assert len(sample) == 501 and set(sample) <= set(text)


def test_default_text(tmp_path, text, monkeypatch, capsys):
    """Tiny Shakespeare where `fit` stores it, otherwise Python's reference manual."""
    monkeypatch.setattr(textbook, "SMALL", TINY)
    monkeypatch.setattr(textbook, "prepare", lambda text: sys.exit(f"{len(text)} characters"))
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"\d{6} characters"):
        run(monkeypatch, "--small")
    assert "Python's reference manual" in capsys.readouterr().err
    (tmp_path / "tiny-shakespeare").mkdir()
    (tmp_path / "tiny-shakespeare" / "input.txt").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2000 characters"):
        run(monkeypatch, "--small")


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"CHARGPT_DATA_DIR": "~/texts"}, "~/texts"),
        ({"CHARGPT_DATA_DIR": "", "XDG_CACHE_HOME": "/cache"}, "/cache/chargpt"),
        ({}, "~/.cache/chargpt"),
    ],
)
def test_default_text_is_where_fit_stores_it(environment, folder, monkeypatch):
    for name in ("CHARGPT_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = Path(folder).expanduser() / "tiny-shakespeare" / "input.txt"
    assert textbook.tiny_shakespeare() == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "text.txt: No such file or directory"),
        ("folder", "text.txt: Is a directory"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"", "the text has 0 characters; this size needs at least 2,570"),
        (b"short", "the text has 5 characters; this size needs at least 2,570"),
    ],
)
def test_unusable_texts_end_in_one_plain_line(tmp_path, content, message, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, path)
    assert isinstance(stop.value.code, str)  # Python prints it to stderr and exits with status 1
    assert message in stop.value.code and "\n" not in stop.value.code
    assert capsys.readouterr() == ("", "")


# --- Explain ------------------------------------------------------------------------------------


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_explain_prints_correct_numbers(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(explain, "TRAINING", explain.TRAINING | dict(epochs=40))
    run(monkeypatch, tmp_path / "text.txt", script=explain)
    out = capsys.readouterr().out
    V = len(set(text))
    assert f"guessing among {V} characters costs ln {V} = {math.log(V):.3f} nats" in out

    inputs, targets = re.search(r"input    (.*)\ntargets  (.*)\n", out).groups()
    assert inputs[1:] == targets[:-1] and inputs in text

    (matrix,) = re.findall(r"sums to 1\n.*\n((?:  .  .*\n){8})", out)
    rows = [numbers(row) for row in matrix.splitlines()]
    assert [len(row) for row in rows] == list(range(1, 9))
    assert all(sum(row) == pytest.approx(1, abs=0.005 * len(row) + 1e-9) for row in rows)

    heads = re.findall(r"score  weight    value\n((?:  .  .*\n){8})output, .* value (.*)\n", out)
    assert len(heads) == 2  # untrained and trained
    for table, output in heads:
        table = torch.tensor([numbers(row) for row in table.splitlines()])  # score, weight, values
        torch.testing.assert_close(table[:, 0].softmax(0), table[:, 1], rtol=0, atol=2e-3)
        torch.testing.assert_close(
            table[:, 1] @ table[:, 2:], torch.tensor(numbers(output)), rtol=0, atol=0.02
        )
    assert numbers(matrix.splitlines()[-1]) == pytest.approx(table[:, 1].tolist(), abs=0.006)

    streams = re.findall(r"the residual stream at position 7\n((?:.*\n){6})", out)
    assert len(streams) == 2
    for stream in streams:
        x, *added, final = (torch.tensor(numbers(row)) for row in stream.splitlines())
        torch.testing.assert_close(x + sum(added), final, rtol=0, atol=4e-3)

    stated = [float(loss) for loss in re.findall(r"mean loss of the line ([\d.]+) nats", out)]
    table = re.findall(r"\n     (.)  +(0\.\d+) +([\d.]+) +(0\.\d+) +([\d.]+)", out)
    assert "".join(character for character, *_ in table) == explain.visible(targets)
    for column, loss in zip((1, 3), stated, strict=True):
        ps = [float(row[column]) for row in table]
        assert -sum(map(math.log, ps)) / len(ps) == pytest.approx(loss, abs=0.02)
    assert stated[1] < stated[0]


def test_explain_prints_a_gradient_and_a_step(tmp_path, text, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(explain, "TRAINING", explain.TRAINING | dict(epochs=0, eval_characters=1))
    run(monkeypatch, tmp_path / "text.txt", script=explain)
    out = capsys.readouterr().out
    by_hand = float(re.search(r"mean over the \d+ positions: (\S+)", out)[1])
    by_torch = float(re.search(r"PyTorch's gradient: (\S+)", out)[1])
    by_trying = float(re.search(r"by 0.01 changes the loss by (\S+)", out)[1]) / 0.01
    assert by_hand == by_torch == pytest.approx(by_trying, rel=0.05)
    (gradient,) = numbers(re.search(r"gradient .*: m", out)[0])
    assert gradient == by_torch
    old, lr, direction, decay, same, new = numbers(re.search(r"\nweight .*", out)[0])
    assert abs(direction) == pytest.approx(1, abs=1e-3) and old == same
    assert new == pytest.approx(old - lr * (direction + decay * old), abs=2e-5)
    before, after = map(float, re.search(r"line ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < before


def test_explain_refuses_a_short_text(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("short", encoding="utf-8")
    with pytest.raises(
        SystemExit, match="the text has 5 characters; this script needs at least 330"
    ):
        run(monkeypatch, tmp_path / "text.txt", script=explain)
