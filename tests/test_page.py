"""The exported page: the HTML file, what its scripts compute, what a browser shows."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
import torch

from chargpt.export import page
from chargpt.export.page import KNOWN, as_script_data, check_known, export, figures
from chargpt.generation import GenerationConfig, sample, uniform
from chargpt.inspection import inspect, logit_lens
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.model.config import ACTIVATIONS, NORMS
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

CHARACTERS = "\n !',.abcdefghé‘"
CHECKPOINT = {
    "datamodule_hyper_parameters": {"corpus": "/home/someone/secret/poems.txt"},
    "global_step": 5,
    "chargpt": {},
}
RUN = Path(__file__).with_name("page.cjs")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed")
needs_browser = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "-")

SWITCHES = {
    "learned": dict(),
    "rotary": dict(
        position="rotary", norm="plain", bias=False, activation="relu2", ngrams={2: 11, 5: 37}
    ),
    "gelu": dict(norm="plain", activation="gelu", ngrams={3: 5}, n_head=1),
    "odd": dict(
        n_embd=15, n_head=3, bias=False, activation="gelu", block_size=7
    ),  # rows that need padding
    "biases everywhere": dict(qkv_bias=True, n_embd=32),
    "pairs": dict(n_embd=18, n_head=3, position="rotary", activation="relu2", block_size=1),
    "long": dict(position="rotary", block_size=150),  # several chunks
}


def make_generator(characters: str = CHARACTERS, half: bool = False, **switches) -> TextGenerator:
    sizes = dict(block_size=20, n_embd=16, n_head=2, n_layer=2)
    gpt = GPT(GPTConfig(**sizes | switches), len(characters))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
            if half:
                parameter.copy_(parameter.half())
    return TextGenerator(gpt, Vocabulary(characters)).eval()


def make_page(folder: Path, generator: TextGenerator, dtype: str = "float32") -> Path:
    export(generator, CHECKPOINT, folder / "page.html", dtype)
    return folder / "page.html"


def node(path: Path, script: str, input=None, simd: bool = True):
    """Evaluate a script in Node together with the page's scripts."""
    request = json.dumps({"script": script, "input": input, "simd": simd})
    command = [NODE, str(RUN), str(path)]
    result = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Path, TextGenerator]:
    """A page and its network, shared by tests that don't change them."""
    generator = make_generator()
    return make_page(tmp_path_factory.mktemp("page"), generator), generator


# ---- the file that Python writes ----


def parts(path: Path) -> dict[str, str]:
    found = re.findall(r'<script[^>]*id="(\w+)">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_file_is_hardly_larger_than_its_weights(tmp_path, dtype):
    generator = make_generator(n_embd=64, ngrams={3: 3000})
    path = make_page(tmp_path, generator, dtype)
    size = sum(parameter.numel() for parameter in generator.parameters()) * (
        2 if dtype == "float16" else 4
    )
    assert path.stat().st_size < 4 / 3 * size + 100_000
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_figures_of_the_run_do_not_include_the_corpus_folder(usual):
    path, generator = usual
    data = json.loads(parts(path)["data"])
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert data["figures"] == dict(parameters=count, corpus="poems.txt", steps=5, val_loss=None)
    assert b"secret" not in path.read_bytes()


def test_the_validation_loss_is_shown_only_for_the_validated_weights():
    gpt = make_generator().gpt
    loss = lambda **entries: figures(gpt, CHECKPOINT | {"chargpt": entries})["val_loss"]
    assert loss(val_loss=1.5) == loss(val_loss=1.5, trainer={"limit_val_batches": 1.0}) == 1.5
    assert loss(val_loss=None) is None  # the weights of another step were validated
    for limit in (1, 0.5):  # only a part of the split was scored
        assert loss(val_loss=1.5, trainer={"limit_val_batches": limit}) is None
    named = CHECKPOINT | {"datamodule_hyper_parameters": {"corpus_name": "tiny-shakespeare"}}
    assert figures(gpt, named)["corpus"] == "tiny-shakespeare"


def test_a_hostile_vocabulary_is_escaped():
    hostile = "</script><script>alert(1)</script><!--\u2028\u2029\u202e'\"\\\x00\ud800\U0001f600{{weights}}"
    text = as_script_data({hostile: [hostile]})
    assert text.isascii() and text.isprintable() and "<" not in text
    assert json.loads(text) == {hostile: [hostile]}


def test_placeholders_in_inserted_text_are_not_replaced(tmp_path):
    checkpoint = dict(
        CHECKPOINT, datamodule_hyper_parameters={"corpus_name": "{{weights}}</script>"}
    )
    export(make_generator(), checkpoint, tmp_path / "page.html", "float16")
    found = parts(tmp_path / "page.html")
    assert list(found) == ["data", "weights", "kernel", "network", "view"]
    assert json.loads(found["data"])["figures"]["corpus"] == "script>"  # the part after the last /


def test_the_content_security_policy_allows_only_the_pages_own_scripts(usual):
    html = usual[0].read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy and "http" not in policy and "*" not in policy
    assert policy.count("'sha256-") == 4
    assert not re.search(r'(?:src|href)=|url\(|@import| on\w+="| style="', html)


# ---- refusals ----


def test_known_settings_and_choices_exist():
    assert set(KNOWN) <= {field.name for field in fields(GPTConfig)}
    assert set(KNOWN["activation"]) <= set(ACTIVATIONS) and set(KNOWN["norm"]) <= set(NORMS)


def test_an_unsupported_setting_is_refused_unless_it_is_at_its_default(tmp_path):
    @dataclass(frozen=True)
    class Newer(GPTConfig):
        sliding: int = 0
        experts: list[int] = field(default_factory=list)

    sizes = dict(block_size=20, n_embd=16, n_head=2, n_layer=2)
    generator = make_generator()
    generator.gpt.config = Newer(**sizes)
    config = json.loads(parts(make_page(tmp_path, generator))["data"])["config"]
    assert set(config) == set(KNOWN)
    (tmp_path / "page.html").unlink()
    generator.gpt.config = Newer(**sizes, experts=[2])
    with pytest.raises(UserError, match=r"does not support the setting experts \(\[2\]\)"):
        check_known(generator.gpt)
    generator.gpt.config = Newer(**sizes, sliding=3)
    with pytest.raises(UserError, match=r"does not support the setting sliding \(3\)"):
        export(generator, CHECKPOINT, tmp_path / "page.html", "float16")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_choice_is_refused():
    generator = make_generator()
    object.__setattr__(generator.gpt.config, "activation", "unheard-of")
    with pytest.raises(UserError, match="activation 'unheard-of', only relu, gelu, relu2"):
        check_known(generator.gpt)


@pytest.mark.parametrize(
    "value, message",
    [
        (1e5, "not a finite float16 number; try --export.dtype float32"),
        (math.nan, "not a finite float16 number$"),
    ],
)
def test_weights_that_are_not_finite_are_refused(tmp_path, value, message):
    generator = make_generator()
    with torch.no_grad():
        generator.gpt.head.bias[3] = value
    with pytest.raises(UserError, match="^head.bias has a weight that is " + message):
        export(generator, CHECKPOINT, tmp_path / "page.html", "float16")
    assert not list(tmp_path.iterdir())


def test_a_network_too_large_for_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"too many for a page \(at most 1,000\)"):
        export(make_generator(), CHECKPOINT, tmp_path / "page.html", "float16")


def test_invalid_output_paths_are_refused(tmp_path):
    generator = make_generator()
    with pytest.raises(UserError, match="there is no folder"):
        export(generator, CHECKPOINT, tmp_path / "none" / "page.html", "float16")
    with pytest.raises(UserError, match="it is not a file"):
        export(generator, CHECKPOINT, tmp_path, "float16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(make_generator(), CHECKPOINT, tmp_path / "page.html", "float16")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("page.html", "old")]


def test_the_command(trained, tmp_path, command):
    result = command(trained, "export", "--to", "page", "--output", str(tmp_path / "romeo.html"))
    assert result.status == 0 and "wrote" in result.err and not result.out
    assert json.loads(parts(tmp_path / "romeo.html")["data"])["figures"]["corpus"] == "text.txt"


def test_a_checkpoint_of_another_project_is_refused(tmp_path, command):
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    result = command(
        tmp_path, "export", "--to", "page", "--output", "page.html", "--ckpt_path", "other.ckpt"
    )
    assert result.status == 1 and "or project wrote it" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["other.ckpt"]


# ---- what its scripts compute ----


@needs_node
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("dtype, simd", [("float32", True), ("float32", False), ("float16", True)])
def test_logits_match_pytorch(tmp_path, switches, dtype, simd):
    generator = make_generator(half=dtype == "float16", **switches)
    block_size, V = generator.gpt.config.block_size, len(CHARACTERS)
    ids = random.Random(2).choices(range(V), k=block_size)
    script = "check_example(gpt, DATA.example); logits_of(input)"
    found = node(make_page(tmp_path, generator, dtype), script, ids, simd)
    with torch.no_grad():
        expected = generator.gpt(torch.tensor([ids]))[0]
    torch.testing.assert_close(torch.tensor(found).view(block_size, V), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # predictions are not uniform


def with_different_code() -> TextGenerator:
    """A network with a change that no setting and no weight reveals."""
    generator = make_generator()
    generator.gpt.blocks[0].feed_forward.activation = torch.sigmoid
    return generator


@needs_node
def test_a_network_in_training_mode_is_exported_without_dropout(tmp_path):
    path = make_page(tmp_path, make_generator(dropout=0.5).train())
    assert node(path, "check_example(gpt, DATA.example); true")


def test_a_network_whose_logits_overflow_is_refused(tmp_path):
    generator = make_generator()
    with torch.no_grad():
        generator.gpt.head.weight.fill_(3e38)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        make_page(tmp_path, generator)


@needs_node
def test_a_network_whose_code_has_changed_is_noticed(tmp_path):
    script = """
    (() => { try { check_example(gpt, DATA.example) } catch (error) { return error.message } })()
    """
    message = node(make_page(tmp_path, with_different_code()), script)
    assert message == "this page does not compute what its network computes in Python"


SETTINGS = [
    dict(temperature=0.0),
    *(dict(temperature=0.8, top_k=5, seed=seed) for seed in (1, -1, 2**70 + 3, 2**32)),
    dict(temperature=1.3, top_p=0.7, seed=5),
    dict(temperature=0.5, top_k=9, top_p=0.9, seed=6),
    dict(temperature=1.0, top_k=100, top_p=1.0),
]
WRITE = """
input.map(({ prompt, settings }) => {
  settings.seed = BigInt(settings.seed);
  check_settings(settings);
  const chunks = generate(gpt, vocabulary.encode(prompt), settings);
  return [...chunks].flatMap(({ ids }) => ids.map((id) => vocabulary.characters[id])).join("");
})
"""


@needs_node
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_generated_text_matches_python(tmp_path, switches):
    generator = make_generator(**switches)
    texts = [("ab", s) for s in SETTINGS] + [
        ("bad café, a face. " * 9, SETTINGS[1]),
        ("!", SETTINGS[2]),
    ]
    requests = []
    for prompt, changes in texts:
        settings = dict(max_new_chars=80, temperature=0.8, top_k=None, top_p=None, seed=0) | changes
        requests.append({"prompt": prompt, "settings": settings | {"seed": str(settings["seed"])}})
    found = node(make_page(tmp_path, generator), WRITE, requests)
    for (prompt, settings), text in zip(texts, found):
        assert prompt + text == generator.complete(prompt, max_new_chars=80, **settings)


@needs_node
def test_random_numbers_match_python(usual):
    random.seed(3)
    cases = [
        (random.randrange(-(2**70), 2**70), random.randrange(9), random.randrange(10**6))
        for _ in range(300)
    ]
    cases += [(0, 0, 0), (-1, 0, 1), (2**64, 1, 2**33)]
    inputs = [[str(seed), sample, position] for seed, sample, position in cases]
    found = node(usual[0], "input.map(([seed, ...rest]) => uniform(BigInt(seed), ...rest))", inputs)
    assert found == [uniform(*case) for case in cases]


@needs_node
def test_sampling_breaks_ties_like_python(usual):
    random.seed(4)
    logits = [[random.choice([0.0, 1.0, 1.5, -2.0]) for _ in range(12)] for _ in range(60)]
    configs = [
        dict(temperature=t, top_k=k, top_p=p)
        for t in (0, 0.7)
        for k in (None, 1, 4)
        for p in (None, 0.5, 0.85)
    ]
    numbers = [random.random() for _ in logits]
    script = "input.configs.map((c) => input.logits.map((l, i) => sample(Float32Array.from(l), c, input.numbers[i])))"
    found = node(usual[0], script, dict(logits=logits, configs=configs, numbers=numbers))
    rows, uniforms = torch.tensor(logits), torch.tensor(numbers, dtype=torch.float64)
    assert found == [
        sample(rows, GenerationConfig(**config), uniforms).tolist() for config in configs
    ]


@needs_node
def test_erfc_is_accurate_to_float32_precision(usual):
    points = [i / 100 for i in range(-700, 701)]
    for point, found in zip(points, node(usual[0], "input.map(erfc)", points)):
        assert math.isclose(found, math.erfc(point), rel_tol=2e-7)


@needs_node
def test_float16_is_decoded_exactly(usual):
    halves = np.arange(65536, dtype=np.uint16)
    finite = halves[np.isfinite(halves.view(np.float16))]
    found = node(
        usual[0], "Array.from(half_to_float(Uint16Array.from(input).buffer))", finite.tolist()
    )
    assert np.array_equal(np.float32(found), finite.view(np.float16).astype(np.float32))


SERVE = """
(async () => {
  const messages = [];
  const server = new Server((message) => messages.push(message));
  server.answer({ type: "load", job: 1, config: DATA.config, vocab_size: gpt.vocab_size, weights: DATA.weights, base64, example: DATA.example });
  if (messages[0].type !== "loaded") throw new Error(messages[0].message);
  for (const message of input) {
    if (message.settings) message.settings.seed = BigInt(message.settings.seed);
    await server.answer(message);
  }
  for (const message of messages) for (const key in message)
    if (ArrayBuffer.isView(message[key])) message[key] = Array.from(message[key]);
  return JSON.parse(JSON.stringify(messages, (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value)));
})()
"""


@needs_node
@pytest.mark.parametrize("switches", ["learned", "odd", "pairs"])
def test_losses_of_a_scored_text_match_python(tmp_path, switches):
    generator = make_generator(**SWITCHES[switches])
    text = "abba, bad café! face. 'a bed' " * 3
    requests = [dict(type="score", job=2, ids=generator.encode(text))]
    messages = node(make_page(tmp_path, generator), SERVE, requests)
    losses = [
        loss for message in messages if message["type"] == "text" for loss in message["losses"]
    ]
    torch.testing.assert_close(
        torch.tensor(losses), generator.score(text).losses, rtol=0, atol=1e-4
    )
    assert messages[-1]["type"] == "ended" and not messages[-1]["stopped"]


def inspected(gpt: GPT, ids: list[int], layer: int, head: int | None) -> dict[str, torch.Tensor]:
    """What Python finds at the last of these ids, under the names of the page's `trace`."""
    with inspect(gpt) as layers, torch.no_grad():
        gpt(torch.tensor([ids]))
    last = [record.residual[0, -1] for record in layers]
    found = {"embeddings": layers[0].input[0, -1], "lens": logit_lens(gpt, layers)[:, 0, -1]}
    found["residuals"] = torch.stack(last)
    found["maps"] = layers[layer].attention[0, :, -64:, -64:]
    if head is not None:
        found["query"] = layers[layer].queries[0, head, -1]
        found["keys"] = layers[layer].keys[0, head]
    return found


def compare_traces(trace: dict, expected: dict[str, torch.Tensor], position: int) -> None:
    found = dict(trace, residuals=[block["residual"] for block in trace["blocks"]])
    if trace["pair"]:
        found |= trace["pair"]
    if trace["maps"]:
        # The maps may reach beyond the selected position: compare the rows up to it.
        n = trace["maps"]["n"]
        maps = torch.tensor(trace["maps"]["weights"]).view(-1, n, n)
        shown = position - trace["maps"]["from"]
        found["maps"], size = maps[:, :shown, :shown], expected["maps"].size(-1)
        assert maps.triu(1).abs().max() == 0
        assert shown <= size
        expected = dict(expected, maps=expected["maps"][:, size - shown :, size - shown :])
    else:
        expected = {name: value for name, value in expected.items() if name != "maps"}
    for name, value in expected.items():
        numbers = torch.as_tensor(found[name], dtype=torch.float32)
        torch.testing.assert_close(numbers, value, rtol=0, atol=1e-4)


@needs_node
@pytest.mark.parametrize("most", [2**28, 1])  # caches are stored, or recomputed
@pytest.mark.parametrize("switches", ["learned", "rotary", "odd"])
def test_inspection_shows_the_logits_and_attention_of_generation(tmp_path, switches, most):
    """At every character of a text longer than the context, in the window it was generated with."""
    generator = make_generator(**SWITCHES[switches])
    config, prompt = generator.gpt.config, "a face, a bad café " * 2
    settings = dict(max_new_chars=40, temperature=0.8, top_k=None, top_p=None, seed="3")
    text = generator.complete(prompt, max_new_chars=40, seed=3)
    ids = generator.encode(text)
    looks = [
        dict(type="look", job=position, position=position, layer=1, head=head, until=until)
        for position in [70, *range(1, len(ids) + 1)]
        for head, until in ((None, None), (1, position + 5))
        if position <= len(ids)
    ]
    path = make_page(tmp_path, generator)
    path.write_text(
        path.read_text("utf-8").replace("PASSAGES_BYTES = 2 ** 28", f"PASSAGES_BYTES = {most}"),
        "utf-8",
    )
    messages = node(
        path,
        SERVE,
        [dict(type="write", job=2, prompt=ids[: len(prompt)], settings=settings), *looks],
    )
    written = [m for m in messages if m["type"] == "text"]
    assert ids[len(prompt) :] == [id for message in written for id in message["ids"]]
    losses = {m["from"] + i: loss for m in written for i, loss in enumerate(m["losses"])}
    assert list(losses)[-1] == len(ids) - 1
    seen = [m for m in messages if m["type"] == "seen"]
    assert len(seen) == len(looks)
    for look, message in zip(looks, seen):
        position, first = look["position"], message["first"]
        assert position - first <= config.block_size and (position == first + 1) <= (
            position == 1 or config.block_size < 3
        )
        with inspect(generator.gpt) as layers, torch.no_grad():
            logits = generator.gpt(torch.tensor([ids[first:position]]))[0, -1]
        expected = inspected(generator.gpt, ids[first:position], layer=1, head=look["head"])
        compare_traces(message["trace"], expected, position)
        weights = layers[1].attention[0, :, -1]
        weights = weights.mean(0) if look["head"] is None else weights[1]
        torch.testing.assert_close(torch.tensor(message["logits"]), logits, rtol=0, atol=1e-4)
        found = torch.tensor(message["weights"], dtype=torch.float32)
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-5)
        if position in losses:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[position])).item()
            assert math.isclose(losses[position], loss, abs_tol=1e-4)


@needs_node
def test_unknown_characters_are_described_like_in_python(usual):
    path, generator = usual
    texts = [
        "É“”",
        "x\u0301\u0344\ufe0f\u20dd",
        "\u202e\t\r\x00\x85\xa0\\\U0001f600 🜚",
        "Ab" * 3 + "XYZ" * 5,
        "ijklmnopqrstuvw",
        "´`„ﬁÅß",
    ]
    script = "input.map((text) => { try { return vocabulary.encode(text) } catch (error) { return error.message } })"
    for text, found in zip(texts, node(path, script, texts)):
        with pytest.raises(UserError) as refused:
            generator.vocabulary.encode(text)
        assert found == str(refused.value)


@needs_node
def test_invalid_settings_give_pythons_messages(usual):
    bad = [
        dict(temperature=-1),
        dict(top_k=0),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(max_new_chars=-1),
    ]
    usual_settings = dict(max_new_chars=5, temperature=0.8, top_k=None, top_p=None)
    script = "input.map((s) => { try { check_settings(s); return '' } catch (error) { return error.message } })"
    for settings, found in zip(bad, node(usual[0], script, [usual_settings | b for b in bad])):
        with pytest.raises(ValueError) as refused:
            GenerationConfig(**settings)
        assert found.replace("a whole number of ", "") == str(refused.value)


# ---- what a browser shows ----


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    if chromium.missing():
        pytest.skip(chromium.missing())
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(chrome, usual):
    chrome.open(usual[0])
    return chrome


def test_the_browser_generates_pythons_text_without_requests(chrome, usual):
    path, generator = usual
    chrome.requests(), chrome.problems()
    chrome.open(path)
    assert chrome.write("a bad café", temperature=0, max_new_chars=60) == generator.complete(
        "a bad café", temperature=0, max_new_chars=60
    )
    for seed in (1, -(2**40)):
        text = chrome.write("ab", temperature=0.8, top_k=5, max_new_chars=100, seed=seed)
        assert text == generator.complete(
            "ab", temperature=0.8, top_k=5, max_new_chars=100, seed=seed
        )
    assert chrome.text("#text").removesuffix("…") == text
    assert chrome.write("", max_new_chars=3, seed=1)[0] == "\n"
    chrome.js("select(2)")
    chrome.wait("inside.logits")
    asked = {url.partition(":")[0] for url in chrome.requests()}
    assert asked <= {"file", "blob"}
    assert chrome.problems() == []


def test_the_page_cannot_load_anything(opened):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    attempts = [
        f"fetch('{address}/fetch', {{mode: 'no-cors'}})",
        f"new Promise((good, bad) => {{ const i = new Image(); i.onload = good; i.onerror = bad; i.src = '{address}/image' }})",
        f"import('{address}/module')",
        "new Promise((good, bad) => { const s = document.createElement('script'); s.onload = good; s.onerror = bad; s.src = 'data:text/javascript,1'; document.body.append(s) })",
    ]
    for attempt in attempts:
        script = f"const done = arguments[0]; ({attempt}).then(() => done('through'), () => done('refused'))"
        assert opened.driver.execute_async_script(script) == "refused", attempt
    assert "Content Security Policy" in " ".join(opened.problems())
    server.shutdown()
    assert asked == []


def test_the_page_writes_at_once_and_a_reload_keeps_the_form(chrome, usual):
    path, generator = usual
    chrome.open(path)
    settings = dict(max_new_chars=500, temperature=0.8, seed=0)
    assert chrome.element("#prompt").get_property("value") == "a"  # the first known candidate
    assert chrome.js("text.characters.join('')") == generator.complete("a", **settings)
    assert chrome.text("#status").startswith("Done. 500 characters generated")
    assert chrome.js("document.querySelector('main').hidden") is False
    chrome.write("a bad face", max_new_chars=40, seed=7)
    chrome.driver.refresh()
    chrome.wait("document.readyState === 'complete' && text.ended && text.characters.length")
    assert chrome.js("text.characters.join('')") == generator.complete(
        "a bad face", max_new_chars=40, seed=7
    )


def test_the_first_character_can_be_selected(opened):
    opened.write("abba", max_new_chars=10, seed=2)
    opened.js("text.spans[0]").click()
    assert opened.js("inside.position") == 0
    assert opened.element("#position").get_property("value") == "1"
    assert opened.text("#seen").startswith("The network does not predict the first character")
    assert not opened.element("#guesses").is_displayed()
    opened.click("#close")
    assert opened.js("inside.position") is None and opened.text("#seen") == ""


def test_a_click_shows_probabilities_that_follow_the_sliders(opened, usual):
    generator = usual[1]
    text = opened.write("abba", temperature=1, max_new_chars=10, seed=2)
    opened.driver.execute_script("window.eighth = text.spans[7]")
    opened.js("eighth").click()
    opened.wait("inside.logits")
    with torch.no_grad():
        logits = generator.gpt(torch.tensor([generator.encode(text[:7])]))[0, -1]
    probabilities = logits.softmax(-1)
    assert opened.text("#bars li:first-child .percent") == f"{probabilities.max():.0%}"
    actual = generator.encode(text[7])[0]
    assert f"{-probabilities[actual].log2():.2f} bits" in opened.text("#seen")
    assert opened.element("#position").get_property("value") == "8"  # counted from 1
    opened.fill("#top_k", 1)
    assert opened.text("#bars li:first-child .percent") == "100%"
    assert opened.text("#bars li:nth-child(2) .percent") == "0%"
    opened.fill("#top_k", len(CHARACTERS))
    opened.fill("#temperature", 0)
    assert opened.text("#bars li:first-child .percent") == "100%"


TRACE = "JSON.parse(JSON.stringify(inside.trace, (_, v) => (ArrayBuffer.isView(v) ? Array.from(v) : v)))"


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_lens_maps_and_query_times_key_match_inspect(chrome, tmp_path, switches):
    generator = make_generator(**switches)
    gpt, characters = generator.gpt, generator.vocabulary.characters
    chrome.problems()
    chrome.open(make_page(tmp_path, generator))
    text = chrome.write("a bad café face", temperature=1, max_new_chars=160, seed=4)
    ids = generator.encode(text)
    layer, head = 1, gpt.config.n_head - 1
    chrome.click("#diagram li:nth-child(6) button")
    assert chrome.text("#stage") == "Attention 2"
    chrome.js(f"choose_head({head})")
    for position in (9, 90, 130, len(ids)):
        chrome.js(f"select({position})")
        chrome.wait(f"inside.seen === {position} && inside.trace?.pair")
        first, trace = chrome.js("inside.first"), chrome.js(TRACE)
        expected = inspected(gpt, ids[first:position], layer, head)
        compare_traces(trace, expected, position)
        # the diagram shows the guesses and shapes, and the sentence the weight
        T = position - first
        probabilities = expected["lens"].softmax(-1)
        rows = chrome.js("STAGES.map((stage) => stage.cells.map((cell) => cell.textContent))")
        assert rows[0][1] == f"({T})" and rows[2][1] == f"({gpt.config.n_head}, {T}, {T})"
        for stage, row in enumerate((1, 4, 7)):
            assert rows[row][1] == f"({T}, {gpt.config.n_embd})"
            shown, share = rows[row][2].split("  ")
            best = probabilities[stage].max()
            assert characters[probabilities[stage].argmax()] == {"␣": " ", "↵": "\n"}.get(
                shown, shown
            )
            assert math.isclose(float(share.strip(" %<")), 100 * best, abs_tol=0.51)
            if position < len(ids):
                bits = -probabilities[stage, ids[position]].log2().item()
                assert math.isclose(float(rows[row][3]), bits, abs_tol=0.006)
        for key in {first, position - 1}:
            chrome.fill("#key", key + 1)
            chrome.js("document.getElementById('key').dispatchEvent(new Event('change'))")
            with inspect(gpt) as layers, torch.no_grad():
                gpt(torch.tensor([ids[first:position]]))
            weight = layers[layer].attention[0, head, -1, key - first].item()
            shown = re.search(r"the weight ([\d.]+)\.$", chrome.text("#weight"))[1]
            assert math.isclose(float(shown), weight, abs_tol=1e-4)
            products = chrome.js(
                "[...document.querySelectorAll('#products tbody td:last-child')].map((e) => Number(e.textContent))"
            )
            dot = (expected["query"] * expected["keys"][key - first]).sum().item()
            assert math.isclose(sum(products), dot, abs_tol=1e-4 * len(products))
    assert chrome.problems() == []


def test_a_click_on_a_map_selects_its_row_and_key(opened, usual):
    text = opened.write("abba", temperature=1, max_new_chars=14, seed=2)
    opened.js("open_stage('attention 0')")
    opened.js("select(12)")
    opened.wait("inside.trace?.maps")
    assert opened.js("inside.trace.maps.n") == 12
    opened.js(
        "document.querySelectorAll('.map div')[1].dispatchEvent(new MouseEvent('click', { bubbles: true, "
        "...((box) => ({ clientX: box.left + box.width * 2.5 / 12, clientY: box.top + box.height * 6.5 / 12 }))"
        "(document.querySelectorAll('.map div')[1].getBoundingClientRect()) }))"
    )
    opened.wait("inside.seen === 7 && inside.trace?.pair")
    assert opened.js("[inside.position, inside.key, document.getElementById('head').value]") == [
        7,
        2,
        "1",
    ]
    assert opened.js("inside.trace.maps.n") == 12  # the map stays as it was
    generator = usual[1]
    with inspect(generator.gpt) as layers, torch.no_grad():
        generator.gpt(torch.tensor([generator.encode(text[:7])]))
    weight = layers[0].attention[0, 1, -1, 2].item()
    assert opened.text("#weight").endswith(f"the weight {weight:.4f}.")


def test_keyboard_focus_stays_when_a_head_is_chosen(opened):
    from selenium.webdriver.common.keys import Keys

    opened.write("abba", max_new_chars=14, seed=2)
    opened.element("#text").send_keys(Keys.END)
    opened.element("input[value=surprise]").send_keys(Keys.ARROW_RIGHT)
    opened.wait("document.querySelector('#stage').textContent === 'Attention 1'")
    opened.wait("inside.trace?.maps")
    opened.element(".map:nth-child(2) button").send_keys(Keys.ENTER)
    opened.wait("inside.trace?.pair && document.querySelector('.chosen')")
    assert opened.js("document.activeElement.textContent") == "Head 2"
    opened.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert opened.js("[inside.position, document.activeElement.id]") == [None, "text"]


def test_every_stage_opens_its_numbers(chrome, tmp_path):
    """For a network with all kinds of embeddings, by keyboard, before and after a selection."""
    from selenium.webdriver.common.keys import Keys

    generator = make_generator(ngrams={2: 11, 5: 37})
    chrome.problems()
    chrome.open(make_page(tmp_path, generator))
    text = chrome.write("abba", temperature=1, max_new_chars=12, seed=2)
    stages = chrome.js("STAGES.map(({ id }) => id)")
    assert len(stages) == 3 * 2 + 4
    for selected in (False, True):
        if selected:
            chrome.js("select(9)")
            chrome.wait("inside.trace")
        for number, id in enumerate(stages):
            if number == 0:
                chrome.element("#diagram button").send_keys(Keys.ENTER)
            else:
                chrome.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
            assert chrome.js("inside.stage") == id
            assert (
                chrome.js(
                    "[...document.querySelectorAll('#diagram button')].findIndex((e) => e.tabIndex === 0)"
                )
                == number
            )
            assert len(chrome.text("#explanation")) > 60
            if id.startswith("attention") and selected:
                chrome.wait("document.querySelector('#maps canvas')")
            shown = chrome.element("#details").text
            assert ("Select a character" in shown) is not selected
            assert selected <= (len(shown) > len(chrome.text("#explanation")) + 60)
    chrome.js("open_stage('embeddings')")
    vectors = chrome.js("[...document.querySelectorAll('figure')].map((e) => e.textContent)")
    assert [v.split(":")[0] for v in vectors] == [
        f"Character “{text[8]}”, row {CHARACTERS.index(text[8])}",
        "Position in the context, row 8",
        *(v.split(":")[0] for v in vectors[2:4] if v.startswith("Last")),
        "Sum",
    ]
    parts = chrome.js("inside.trace.parts.map(({ vector }) => Array.from(vector))")
    chrome.js("document.querySelector('figure:last-of-type details').open = true")
    with inspect(generator.gpt) as layers, torch.no_grad():
        generator.gpt(torch.tensor([generator.encode(text[:9])]))
    torch.testing.assert_close(
        torch.tensor(parts).sum(0), layers[0].input[0, -1], rtol=0, atol=1e-4
    )
    chrome.wait("document.querySelector('figure:last-of-type .numbers').textContent")
    numbers = chrome.text("figure:last-of-type .numbers").split()
    found = torch.tensor([float(x) for x in numbers])
    torch.testing.assert_close(found, layers[0].input[0, -1], rtol=0, atol=1e-4)
    assert chrome.problems() == []


@pytest.mark.parametrize("switches", ["learned", "rotary", "odd"])
def test_what_if_continues_as_python_does(chrome, tmp_path, switches):
    generator = make_generator(**SWITCHES[switches])
    chrome.open(make_page(tmp_path, generator))
    settings = dict(temperature=1.1, max_new_chars=50, seed=3)
    before = chrome.write("a face", **settings)
    chrome.js("select(25)")
    chrome.wait("inside.seen === 25")
    with torch.no_grad():
        first = chrome.js("inside.first")
        logits = generator.gpt(torch.tensor([generator.encode(before[first:25])]))[0, -1]
    drawn = float(re.search(r"random number is (0\.\d+)", chrome.text("#drawn"))[1])
    assert math.isclose(drawn, uniform(3, 0, 25), abs_tol=1e-4)
    cumulative = (logits.double() / 1.1).softmax(-1).cumsum(-1)
    picked = CHARACTERS.index(before[25])
    low, high = map(
        float, re.search(r"\((0\.\d+) to ([01]\.\d+)\)", chrome.text("#drawn")).groups()
    )
    assert math.isclose(high, cumulative[picked], abs_tol=1e-4) and low <= drawn <= high + 1e-4
    marker = chrome.js(
        "Number(document.querySelector('#cumulative b').style.getPropertyValue('--from'))"
    )
    assert math.isclose(marker, drawn, abs_tol=1e-4)

    guess = int(logits.argsort(descending=True)[3])
    chrome.click("#bars li:nth-child(4) button")
    assert chrome.js("text.characters[25]") == CHARACTERS[guess]
    chrome.wait("text.ended && inside.seen === 25")
    after = "".join(chrome.js("text.characters"))
    assert after == generator.complete(before[:25] + CHARACTERS[guess], **settings)
    assert chrome.text("#status").startswith("What if: ")
    assert "You put this character here" in chrome.text("#drawn")
    assert chrome.js("document.activeElement.id") == "text"
    chrome.click("#undo")
    chrome.wait("text.ended && inside.seen === 25")
    assert "".join(chrome.js("text.characters")) == before
    assert not chrome.element("#undo").is_displayed()
    # sliders that were moved since: the number stays, what it picks changes
    chrome.fill("#temperature", 0)
    assert "no random number" in chrome.text("#drawn")


def test_what_if_in_a_prompt_at_the_end_and_in_a_scored_text(opened, usual):
    complete = usual[1].complete
    text = opened.write("abba face", temperature=0.9, max_new_chars=10, seed=1)
    for position in (3, 19):
        opened.js(f"select({position})")
        opened.wait(f"inside.seen === {position}")
        assert ("was not sampled" in opened.text("#drawn")) is (position == 3)
        picked = opened.js("descending(inside.logits)[1]")
        opened.click("#bars li:nth-child(2) button")
        opened.wait("text.ended")
        expected = text[:position] + CHARACTERS[picked]
        found = "".join(opened.js("text.characters"))
        assert found == complete(expected, temperature=0.9, max_new_chars=10, seed=1)
        opened.click("#undo")
        opened.wait("text.ended")
    opened.fill("#prompt", "a bad café")
    opened.click("#score")
    opened.wait("text.ended")
    opened.js("select(4)")
    opened.wait("inside.seen === 4")
    opened.click("#bars li:nth-child(1) button")
    opened.wait("text.ended")
    assert "".join(opened.js("text.characters"))[:4] == "a ba" and opened.js("text.written")
    opened.click("#undo")
    opened.wait("text.ended")
    assert "".join(opened.js("text.characters")) == "a bad café" and not opened.js("text.written")


def test_generation_does_no_work_for_the_panel_unless_a_character_is_selected(opened):
    opened.js(
        "(window.asked = [], worker.post = worker.postMessage, worker.postMessage = (m) => (asked.push(m.type), worker.post(m)))"
    )
    opened.write("abba", max_new_chars=400, seed=2)
    assert opened.js("asked") == ["write"]


def test_attention_weights_are_shown_as_shading(opened, usual):
    generator = usual[1]
    text = opened.write("abba", temperature=1, max_new_chars=12, seed=2)
    opened.js("select(9)")
    opened.wait("inside.logits")
    opened.js("open_stage('attention 0')")
    for selector, label in (("#layer", "Layer 2"), ("#head", "Head 1")):
        opened.element(selector).send_keys(label)
    opened.wait("document.querySelector('#looked').textContent.includes('This head')")
    with inspect(generator.gpt) as layers, torch.no_grad():
        generator.gpt(torch.tensor([generator.encode(text[:9])]))
    weights = layers[1].attention[0, 0, -1]
    found = [
        float(w or 0)
        for w in opened.js("text.spans.map((s) => s.style.getPropertyValue('--weight'))")
    ]
    torch.testing.assert_close(torch.tensor(found[:9]), weights / weights.max(), rtol=0, atol=1e-3)
    assert not any(found[9:])
    assert opened.element("#text").get_attribute("data-shade") == "attention"
    painted = opened.js(
        "getComputedStyle(text.spans[arguments[0]]).backgroundColor", int(weights.argmax())
    )
    assert "46, 108, 196" in painted


def test_a_pasted_text_is_scored(opened, usual):
    text = "a bad café, 'a bed'\n" * 40
    opened.fill("#prompt", text)
    opened.click("#score")
    opened.wait("text.ended")
    assert f"{usual[1].score(text).bits:.3f} bits per character" in opened.text("#status")
    assert opened.js("text.characters.join('')") == text
    assert opened.js("text.losses.filter((loss) => loss > 0).length") == len(text) - 1


def test_the_page_works_with_the_keyboard_alone(opened):
    from selenium.webdriver.common.keys import Keys

    opened.fill("#max_new_chars", 30)
    opened.element("#prompt").send_keys(
        Keys.CONTROL, "a", Keys.NULL, "abba", Keys.CONTROL, Keys.ENTER
    )
    opened.wait("text.ended")
    text = opened.element("#text")
    text.send_keys(Keys.HOME)
    assert opened.js("inside.position") == 0
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert opened.js("inside.position") == 2
    text.send_keys(Keys.END, Keys.ARROW_RIGHT)
    assert opened.js("inside.position") == 34
    opened.wait("inside.seen === 34")
    assert opened.text("#seen") == "What would come next?"
    text.send_keys(Keys.ARROW_UP, Keys.ARROW_DOWN, Keys.ESCAPE)
    assert opened.js("inside.position") is None
    position = opened.element("#position")
    position.send_keys("3", Keys.TAB)
    opened.wait("inside.seen === 2")
    stop = opened.js("(document.getElementById('write').focus(), document.activeElement.id)")
    assert stop == "write"
    opened.driver.switch_to.active_element.send_keys(Keys.ENTER)
    opened.wait("text.ended")
    assert opened.js("document.activeElement.id") == "write"


def test_every_control_has_an_accessible_name(opened):
    unnamed = opened.js(
        "[...document.querySelectorAll('input, textarea, select, button')].filter((e) => !e.labels?.length "
        "&& !e.textContent.trim() && !e.ariaLabel).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    live = opened.js(
        "[...document.querySelectorAll('[role=status], [role=alert]')].map((e) => e.id)"
    )
    assert live == ["problem", "status", "seen"]


def test_errors_are_shown_and_the_field_is_marked_invalid(opened, usual):
    opened.fill("#prompt", "abÉ“")
    opened.click("#write")
    with pytest.raises(UserError) as refused:
        usual[1].vocabulary.encode("abÉ“")
    assert opened.text("#problem") == str(refused.value)
    assert opened.element("#prompt").get_attribute("aria-invalid") == "true"
    for name, value, message in [
        ("seed", "1.5", "whole number"),
        ("max_new_chars", "-1", "at least 0"),
        ("max_new_chars", "", "the length is empty"),
    ]:
        opened.fill("#prompt", "ab")
        opened.fill("#seed", 1)
        opened.fill("#max_new_chars", 5)
        opened.fill(f"#{name}", value)
        opened.click("#write")
        assert message in opened.text("#problem") and "NaN" not in opened.text("#problem")
        assert opened.text("#status") == ""  # not the end of the text before
        assert opened.element(f"#{name}").get_attribute("aria-invalid") == "true"
    opened.fill("#prompt", "a")
    opened.click("#score")
    assert opened.text("#problem") == "scoring needs a text of at least two characters"
    assert opened.write("ab", max_new_chars=5) and opened.text("#problem") == ""


def test_a_network_whose_code_has_changed_generates_nothing(chrome, tmp_path):
    chrome.driver.get(make_page(tmp_path, with_different_code()).as_uri())
    chrome.wait("document.getElementById('problem').textContent.includes('does not compute')")
    assert chrome.text("#text") == ""
    assert not chrome.element("#write").is_enabled()


def test_the_page_stays_responsive_and_can_stop_while_generating(opened):
    opened.fill("#prompt", "abba")
    opened.fill("#max_new_chars", 10**7)
    opened.click("#write")
    opened.wait("text.characters.length > 100")
    opened.js("select(50)")
    opened.wait("inside.seen === 50", 2)
    opened.click("#stop")
    opened.wait("text.ended", 2)
    assert opened.text("#status").startswith("Stopped.")
    count = opened.js("text.characters.length")
    assert opened.js("text.characters.length") == count < 10**6
    assert len(opened.write("ab", max_new_chars=5)) == 7


def test_the_generated_text_can_be_copied(opened):
    text = opened.write("ab\nba\n\nc", max_new_chars=16)
    assert opened.text("#text") == text
    opened.js("(document.execCommand = () => { window.copied = document.activeElement.value })")
    opened.js("(navigator.clipboard.writeText = () => Promise.reject())")
    opened.click("#copy")
    opened.wait("window.copied !== undefined")
    assert opened.js("window.copied") == text
    opened.js("(navigator.clipboard.writeText = async (text) => { window.copied = 'by ' + text })")
    opened.click("#copy")
    opened.wait("window.copied.startsWith('by')")
    assert opened.js("window.copied") == "by " + text
    # lines are separate blocks, but a manual selection has no additional newlines
    opened.js("getSelection().selectAllChildren(document.getElementById('text'))")
    assert opened.js("getSelection().toString()").rstrip("\n") == text.rstrip("\n")
    assert "Copied 24 characters" in opened.text("#status")


HOSTILE = "".join(
    sorted(
        set(
            "</script><img src=x onerror=pwn()>&\"'`\\\n\t\r\u2028\u2029\u202e\u200f\u0301😀{}\x00\ud83d\ude00"
        )
    )
)
LARGE = "".join(map(chr, [10, *range(0x4E00, 0x4E00 + 4999)]))


@pytest.mark.parametrize("characters", [HOSTILE, LARGE, "x"], ids=["hostile", "large", "single"])
def test_any_vocabulary_is_displayed_as_text(chrome, tmp_path, characters):
    generator = make_generator(characters, half=True)
    chrome.problems()
    chrome.open(make_page(tmp_path, generator, "float16"))
    text = chrome.write("", max_new_chars=300, temperature=2, top_k=len(characters), seed=1)
    expected = generator.complete(
        "", max_new_chars=300, temperature=2, top_k=len(characters), seed=1
    )
    assert text == expected
    shown = "text.spans.slice(0, -1).map((s) => [...s.textContent].map((c) => c.codePointAt(0)))"
    assert chrome.js(shown) == [[ord(c)] for c in expected]
    assert (
        chrome.js("document.querySelectorAll('script, img, #text > div > :not(span)').length") == 4
    )
    assert chrome.js("typeof pwn") == "undefined"
    chrome.js("select(5)")
    chrome.wait("inside.logits")
    assert len(chrome.driver.find_elements("css selector", "#bars li")) >= min(10, len(characters))
    assert chrome.problems() == []


@contextmanager
def emulated(page: chromium.Page, phone: bool = False, media: str = "", **features: str):
    """A phone's size, a medium (print), or media features, such as prefers-color-scheme."""
    emulate = page.driver.execute_cdp_cmd
    if phone:
        metrics = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
        emulate("Emulation.setDeviceMetricsOverride", metrics)
    named = [dict(name=name.replace("_", "-"), value=value) for name, value in features.items()]
    emulate("Emulation.setEmulatedMedia", dict(media=media, features=named))
    try:
        yield
    finally:
        emulate("Emulation.setEmulatedMedia", dict(media="", features=[]))
        emulate("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_phone_the_page_fits_and_the_selected_character_is_visible_above_the_panel(opened):
    with emulated(opened, phone=True):
        opened.driver.refresh()
        opened.wait("!document.getElementById('write').disabled")
        opened.write("abcdefgh" * 30, max_new_chars=900, seed=1)
        assert opened.js("document.documentElement.scrollWidth") == 390
        at_the_end = "scrollHeight - t.scrollTop - t.clientHeight < 2"
        opened.wait(f"((t) => t.{at_the_end})(document.getElementById('text'))", 2)
        for position in (900, 8):
            opened.js(f"select({position})")
            opened.wait(f"inside.seen === {position}")
            span, panel = opened.js(
                "[text.spans[arguments[0]], document.querySelector('aside')].map((e) => e.getBoundingClientRect().toJSON())",
                position,
            )
            assert span["top"] >= 0 and span["bottom"] <= panel["top"] < 844 - 200
            assert panel["bottom"] <= 844
        assert opened.js("document.documentElement.scrollWidth") == 390


def test_text_legend_and_status_are_above_the_fold(opened):
    metrics = dict(width=1280, height=900, deviceScaleFactor=1, mobile=False)
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened.write("abcdefgh" * 30, max_new_chars=900, seed=1)
        boxes = opened.js(
            "['legend', 'text', 'status'].map((id) => document.getElementById(id).getBoundingClientRect().toJSON())"
        )
        assert boxes[0]["bottom"] < boxes[1]["top"] + 10 < 400 and boxes[2]["bottom"] <= 900
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_whole_text_is_printed(opened):
    opened.write("abba", max_new_chars=3000, seed=1)
    with emulated(opened, media="print"):
        hidden = "((t) => t.scrollHeight - t.clientHeight)(document.getElementById('text'))"
        assert opened.js(hidden) <= 1
        assert opened.js("getComputedStyle(text.line).contentVisibility") == "visible"
        assert not opened.element("#form").is_displayed()
        opened.js("open_stage('logits')")
        opened.js("select(8)")
        opened.wait("document.querySelector('#vectors .scroll')")
        cut = "[...document.querySelectorAll('aside, .scroll')].filter((e) => e.scrollHeight - e.clientHeight > 2)"
        assert opened.js(f"{cut}.length") == 0


CONTRAST = """
const channels = (color) => {  // red, green, blue and alpha of any CSS color, as painted
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const behind = (element) => {  // the color painted behind an element's text
  if (!element) return channels("Canvas");
  const [r, g, b, a] = channels(getComputedStyle(element).backgroundColor);
  const below = a < 1 ? behind(element.parentElement) : [0, 0, 0, 1];
  return [r, g, b].map((c, i) => c * a + below[i] * (1 - a)).concat(1);
};
const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ratio = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (x + 0.05) / (y + 0.05);
};
const shown = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(":disabled, .hidden"));
const own_text = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
const texts = shown.filter((e) => own_text(e) || e.matches("textarea, input:not([type=range], [type=radio])"));
const controls = shown.filter((e) => e.matches("textarea, input:not([type=range], [type=radio]), select, button, #text"));
const name = (e) => e.id || `${e.localName}.${e.className} ${e.textContent.slice(0, 20)}`;
return [
  texts.map((e) => [name(e), ratio(channels(getComputedStyle(e).color), behind(e))]),
  controls.map((e) => [name(e), Math.max(
    ratio(channels(getComputedStyle(e).borderTopColor), behind(e.parentElement)),
    ratio(behind(e), behind(e.parentElement)),
  )]),
];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    """At least 4.5:1 for text, also on the strongest shading, and 3:1 for the borders of controls."""
    opened.write("abba", max_new_chars=30, seed=1)
    opened.js("(document.getElementById('how').open = true)")
    with emulated(opened, prefers_color_scheme=scheme):
        background = opened.js("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 60) is (scheme == "dark")
        opened.js("select(20)")
        opened.wait("inside.seen === 20")
        for stage in (
            "guess",
            "characters",
            "embeddings",
            "feed-forward 0",
            "logits",
            "attention 1",
        ):
            opened.js(f"open_stage('{stage}')")
            if stage == "attention 1":
                opened.js("choose_head(1)")
                opened.wait("inside.trace.pair && document.querySelector('#products td')")
            opened.driver.execute_script(
                "for (const span of text.spans)"
                "for (const name of ['--loss', '--weight']) span.style.setProperty(name, 1)"
            )
            shade = opened.element("#text").get_attribute("data-shade")
            assert shade == ("attention" if stage == "attention 1" else "surprise")
            texts, controls = opened.driver.execute_script(CONTRAST)
            assert len(texts) > 50 and len(controls) > 15
            assert [found for found in texts if found[1] < 4.5] == []
            assert [found for found in controls if found[1] < 3] == []


def test_shading_and_bars_remain_with_forced_colors(opened):
    opened.write("abba", max_new_chars=30, seed=1)
    opened.js("select(20)")
    opened.wait("inside.seen === 20")
    with emulated(opened, forced_colors="active"):
        widths = []
        for loss in (0, 0.5, 1):
            opened.js("text.spans[9].style.setProperty('--loss', arguments[0])", loss)
            widths.append(
                opened.js("parseFloat(getComputedStyle(text.spans[9]).borderBottomWidth)")
            )
        assert widths[0] < widths[1] < widths[2]
        bar, track = opened.js(
            "['.bars .settings-share', '.bars .bar'].map((e) => getComputedStyle(document.querySelector(e)).backgroundColor)"
        )
        assert bar != track


def test_the_text_is_one_node_for_screen_readers(opened):
    text = opened.write("abba", max_new_chars=1000, seed=1)
    nodes = opened.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    visible = [node for node in nodes if not node["ignored"]]
    names = [node.get("name", {}).get("value", "") for node in visible]
    assert len(visible) < 200
    assert any(name.split() == text.split() for name in names)  # the whole text, to be read
    opened.js("select(8)")
    assert opened.element("#text").get_attribute("aria-valuetext").startswith("9: ")


def test_without_javascript_nothing_claims_to_be_loading(usual):
    html = usual[0].read_text("utf-8")
    body = html[html.index("<body>") : html.index("<script")]
    assert "<main hidden>" in body and "Loading" not in body and "turned off" in body
