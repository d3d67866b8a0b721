"""The exported page in headless Chromium: correctness, size and speed.

    python tests/benchmarks/page.py                     # the sizes of cpu.yaml, laptop.yaml, base.yaml
    python tests/benchmarks/page.py --sizes laptop --chars 500 --seeds 5

The networks have random weights. Texts are compared with Python's, for weights rounded as in the page.
Times are measured in the page: from the click to the arrival of characters, and the longest time for
which the page's event loop was blocked during generation.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from chargpt.export.page import export
from chargpt.model import GPT, GPTConfig
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))
import browser as chromium  # noqa: E402

CHARACTERS = "\n " + "".join(map(chr, range(33, 96)))  # as many as tiny Shakespeare has
PROMPT = "THE PAGE WRITES. "
CHECKPOINT = {"datamodule_hyper_parameters": {}, "global_step": 0, "chargpt": {}}

# Measured in the page: arrival times of messages, and gaps between iterations of the event loop.
WATCH = """
window.times = {gaps: [], texts: []};
const {text: on_text, ended: on_ended} = answers;
answers.text = (data) => { on_text(data); if (data.ids.length) times.texts.push(performance.now()); };
answers.ended = (data) => { on_ended(data); times.ended = performance.now(); };
let last = performance.now();
const channel = new MessageChannel();
channel.port1.onmessage = () => {
  const now = performance.now();
  times.gaps.push(now - last);
  last = now;
  setTimeout(() => channel.port2.postMessage(null), 1);
};
channel.port2.postMessage(null);
window.clicked = (id) => {
  Object.assign(times, {gaps: [], texts: [], ended: null, start: performance.now()});
  document.getElementById(id).click();
};
"""
LOGITS = """
const [positions, done] = arguments;
const found = {};
const before = worker.onmessage;
worker.onmessage = ({data}) => {
  found[data.position] = Array.from(data.logits);
  if (Object.keys(found).length < positions.length) return;
  worker.onmessage = before;
  done(positions.map((position) => found[position]));
};
for (const position of positions) ask("look", {position, layer: 0, head: null, until: null});
"""
LOOK = """
const [position, done] = arguments;
const before = answers.seen;
answers.seen = (data) => { before(data); answers.seen = before; done(performance.now() - start); };
const start = performance.now();
select(position);
"""


def make_generator(name: str) -> TextGenerator:
    """A network of a configuration's size with random weights, large enough that each layer matters."""
    settings = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text("utf-8"))
    known = GPTConfig.__dataclass_fields__.keys()
    model = {key: value for key, value in settings["model"].items() if key in known}
    gpt = GPT(GPTConfig(**model, block_size=settings["data"]["block_size"]), len(CHARACTERS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in gpt.named_parameters():
            if parameter.dim() > 1:
                scale = 0.5 if "embedding" in key else parameter.size(1) ** -0.5
                parameter.normal_(
                    std=scale * (3 if key == "head.weight" else 1), generator=generator
                )
    return TextGenerator(gpt, Vocabulary(CHARACTERS)).eval()


def measure(name: str, chars: int, seeds: int, page: chromium.Page, folder: Path) -> None:
    generator = make_generator(name)
    gpt, path = generator.gpt, folder / f"{name}.html"
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{name}: {count / 1e6:.1f} million parameters, block_size {gpt.config.block_size}")
    differences = {}
    for dtype in ("float32", "float16"):
        export(generator, CHECKPOINT, path, dtype)
        if dtype == "float16":
            with torch.no_grad():
                for parameter in gpt.parameters():
                    parameter.copy_(parameter.half())
        started = time.perf_counter()
        page.open(path)
        opened = time.perf_counter() - started
        text = (PROMPT * 100)[: gpt.config.block_size]
        page.fill("#prompt", text)
        page.click("#score")
        page.wait("text.ended")
        positions = list(range(1, len(text) + 1, 5))
        found = torch.tensor(page.driver.execute_async_script(LOGITS, positions))
        with torch.no_grad():
            expected = gpt(torch.tensor([generator.encode(text)]))[0, [p - 1 for p in positions]]
        differences[dtype] = (found - expected).abs().max().item()
    print(
        f"  logits differ by {differences['float32']:.1e} (float32), {differences['float16']:.1e} (float16)"
    )
    size = path.stat().st_size
    print(
        f"  {size:,} bytes, {size - 8 / 3 * count:,.0f} of them beside the float16 weights in base64"
    )
    print(f"  loaded, with the first text written, in {opened:.2f} s")

    page.driver.execute_script(WATCH)
    speeds, firsts, gaps, same = [], [], [], 0
    settings = [dict(temperature=0.0)] + [
        dict(temperature=0.8, top_k=20, seed=s) for s in range(seeds)
    ]
    page.fill("#max_new_chars", chars)
    for chosen in settings:
        for key, value in chosen.items():
            page.fill(f"#{key}", value)
        if "top_k" not in chosen:
            page.fill("#top_k", len(CHARACTERS))
        page.fill("#prompt", PROMPT)
        page.js("clicked('write')")
        page.wait("text.ended", 200)
        times = page.js("times")
        speeds.append(1000 * chars / (times["ended"] - times["start"]))
        firsts.append(times["texts"][0] - times["start"])
        gaps.append(max(times["gaps"]))
        text = page.js("text.characters.join('')")
        same += text == generator.complete(PROMPT, max_new_chars=chars, **chosen)
    print(f"  {same} of {len(settings)} texts of {chars} characters equal those of Python")
    print(f"  {max(speeds):.0f} characters per second ({min(speeds):.0f} to {max(speeds):.0f})")
    print(
        f"  first character after {max(firsts):.0f} ms, event loop blocked for at most {max(gaps):.0f} ms"
    )

    page.fill("#prompt", (PROMPT * 100)[: gpt.config.block_size])
    page.fill("#max_new_chars", 1)
    page.js("clicked('write')")
    page.wait("text.ended", 60)
    first = page.js("times.texts[0] - times.start")
    print(f"  first character after a prompt of block_size characters: {first:.0f} ms")

    page.fill("#prompt", (PROMPT * 100)[:1000])
    page.js("clicked('score')")
    page.wait("text.ended", 60)
    page.click("input[value=attention]")
    read = page.js("times.ended - times.start")
    look = page.driver.execute_async_script(LOOK, 900)
    print(f"  1,000 characters scored in {read:.0f} ms, attention weights in {look:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["cpu", "laptop", "base"])
    parser.add_argument("--chars", type=int, default=500, help="characters per text")
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of texts at temperature 0.8, top_k 20"
    )
    arguments = parser.parse_args()
    if reason := chromium.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sizes:
            with chromium.browser(Path(folder, "profile-" + name)) as page:
                measure(name, arguments.chars, arguments.seeds, page, Path(folder))


if __name__ == "__main__":
    main()
