"""Fuzz test: malformed input must end in a plain error message and a nonzero exit status.

Malformed flags, values, configurations, texts, prompts and checkpoints are passed to the command
line, in this process. For each, the test checks that there is no traceback, that standard error has
one "error: ..." of at most two lines, and that no new files remain. Then random texts are encoded
and decoded with a vocabulary.

    python tests/benchmarks/fuzz.py --inputs 1000 --texts 10000
"""

import argparse
import collections
import contextlib
import io
import itertools
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from chargpt.cli.main import main as chargpt
from chargpt.training import display
from chargpt.vocabulary import Vocabulary

CONFIG = """\
trainer: {max_steps: 2, val_check_interval: 2, accelerator: cpu, enable_progress_bar: false}
model: {n_embd: 8, n_head: 2, n_layer: 1}
data: {corpus: text.txt, block_size: 8, batch_size: 2}
"""
TEXT = "The king walks in the garden; the queen sings.\n" * 40

STRANGE = (
    "\0", "\u202e", "\u200f", "\ufeff", "e\u0301", "🙂", "👩‍👩‍👧", "\ud800", "\udfff", "\u2028", "\x1b[31m", "日本", "ß", "\r", "\t",
)  # fmt: skip
COMMANDS = ("fit", "validate", "test", "predict", "export", "import")
BASE_COMMANDS = {
    "fit": ["fit", "--config=tiny.yaml"],
    "export": ["export", "--to=page", "--output=x.html"],
    "import": ["import", "bad.pt", "--meta=bad.pkl"],
}
FLAGS = {  # flags with invalid values
    "fit": {
        "--model.n_embd": ["0", "-4", "7", "1.5", "1e3x", "null", "[]", "nan", "9" * 30],
        "--model.n_head": ["0", "-1", "3", "x"],
        "--model.n_layer": ["-1", "0", "many"],
        "--model.dropout": ["1", "-0.1", "2", "nan", "inf", "x", "null"],
        "--model.lr": ["0", "-1", "nan", "x", "[1]"],
        "--model.position": ["up", "", "1"],
        "--model.short_contexts": ["{3: 0.5}", "{a: 1}", "[1]", "{0: 1}", "x"],
        "--data.block_size": ["0", "-1", "99999", "1e9", "x", "null"],
        "--data.batch_size": ["0", "-3", "x", "9" * 15],
        "--data.val_fraction": ["0", "-1", "1", "2", "nan", "x", "1e-9"],
        "--data.test_fraction": ["-1", "1", "0.95", "1e-9", "x"],
        "--data.corpus": [
            "",
            "none.txt",
            "/",
            "/dev/null",
            "a" * 5000,
            "empty.txt",
            "one.txt",
            "latin.txt",
            "zip.txt",
        ],
        "--data.num_workers": ["-1", "x"],
        "--seed_everything": ["-1", "x", "1.5", "9" * 30],
        "--trainer.max_steps": ["0", "-7", "x", "null"],
        "--trainer.max_time": ["x", "1", "00:99", "{days: x}"],
        "--trainer.precision": ["8", "x", "64-false"],
        "--trainer.accelerator": ["banana", "", "tpu"],
        "--trainer.devices": ["0", "x", "[99]", "-5"],
        "--trainer.strategy": ["banana", "1"],
        "--trainer.val_check_interval": ["0", "-1", "x"],
        "--trainer.accumulate_grad_batches": ["0", "-1", "x"],
        "--trainer.callbacks": [
            "Nothing",
            "os.system",
            "[1]",
            "{class_path: EarlyStopping}",
            "{class_path: 3}",
        ],
        "--trainer.logger": ["Nothing", "os.system", "{class_path: X}"],
        "--trainer.limit_val_batches": ["-1", "x"],
        "--trainer.gradient_clip_val": ["x", "[]"],
        "--ckpt_path": ["none.ckpt", "/", "", "a\0b", "text.txt"],
    },
    "predict": {
        "--generate.prompt": ["Über", "日本", "#", "\0"],
        "--generate.max_new_chars": ["-1", "x", "1.5", "null"],
        "--generate.temperature": ["-1", "nan", "inf", "x"],
        "--generate.top_k": ["0", "-1", "x", "1.5"],
        "--generate.top_p": ["0", "-1", "1.5", "nan", "x"],
        "--generate.num_samples": ["0", "-1", "x"],
        "--generate.stop": ['[""]', '["#"]'],
        "--generate.format": ["xml", "", "null"],
        "--generate.output": ["no/such/folder/x.txt", "/"],
        "--generate.prompts": ["none.txt", "empty.txt", "latin.txt", "/"],
        "--generate.seed": ["x", "1.5"],
        "--ckpt_path": ["none.ckpt", "/", "a\0b", "text.txt"],
    },
}
FLAGS["export"] = {
    "--to": ["pdf", "", "null"],
    "--output": ["no/such/folder/x.html", "/", "tiny.yaml/x.html", "a" * 5000, "a\0b"],
    "--export.dtype": ["int8", "x", "null"],
    "--ckpt_path": FLAGS["predict"]["--ckpt_path"],
}
FLAGS["import"] = {"--meta": ["none.pkl", "/", "text.txt", "a\0b", ""]}
FLAGS["validate"] = FLAGS["test"] = {
    "--ckpt_path": FLAGS["predict"]["--ckpt_path"],
    "--data.batch_size": ["0", "-3", "x"],
    "--data.corpus": [*FLAGS["fit"]["--data.corpus"], "other.txt"],
    "--data.val_fraction": FLAGS["fit"]["--data.val_fraction"],
    "--model.n_embd": ["16", "0", "x"],
}


def strange(random: random.Random, n: int = 6) -> str:
    return "".join(random.choices(STRANGE, k=random.randint(1, n)))


def base_command(random: random.Random, command: str) -> list[str]:
    return BASE_COMMANDS.get(command, [command])


# Each of these returns a malformed command line and writes the files it needs to the current folder.


def bad_command(random: random.Random) -> list[str]:
    word = random.choice(
        [
            "",
            "fitt",
            "Fit",
            "train",
            "--verbose",
            "-c",
            "--config=tiny.yaml",
            "help",
            strange(random),
        ]
    )
    return [*([word] if word else []), *random.sample(["--x", "word"], k=random.randint(0, 2))]


def bad_flag(random: random.Random) -> list[str]:
    command = random.choice(list(COMMANDS))
    flag = random.choice(list(FLAGS[command])).lstrip("-")
    i = random.randrange(1, len(flag))
    misspelled = random.choice(
        [
            flag[:i] + flag[i + 1 :] + "q",
            flag + strange(random),
            flag[:i],
            "zz" + flag,
            flag.upper(),
        ]
    )
    form = random.choice(
        [[f"--{misspelled}=1"], [f"--{misspelled}", "1"], [f"--{misspelled}"], [misspelled]]
    )
    return [*base_command(random, command), *form]


def bad_value(random: random.Random) -> list[str]:
    command = random.choice(list(COMMANDS))
    flag = random.choice(list(FLAGS[command]))
    value = random.choice(FLAGS[command][flag])
    return [
        *base_command(random, command),
        *random.choice([[f"{flag}={value}"], [flag, value], [flag]]),
    ]


def strange_value(random: random.Random) -> list[str]:
    command = random.choice(list(COMMANDS))
    flag = random.choice([flag for flag in FLAGS[command] if "output" not in flag])
    return [*base_command(random, command), f"{flag}={strange(random)}"]


def bad_config(random: random.Random) -> list[str]:
    keys = [
        "trainer.max_steps",
        "model.n_embd",
        "data.corpus",
        "model.lr",
        "trainer.callbacks",
        "data",
    ]
    group, _, name = random.choice(keys).partition(".")
    command = random.choice(list(COMMANDS))
    sizes = ["x", "[1]", "{a: 1}", "!!python/object:os.x {}", ".nan"]
    if command not in ("validate", "test"):  # which use the checkpoint's value instead
        sizes.append("null")
    content = random.choice(
        [
            lambda: random.randbytes(random.randint(1, 300)),
            lambda: CONFIG.encode()[: random.randint(1, 40)],
            lambda: f"{group}: {{{name}q: 1}}\n".encode(),
            lambda: f"{group}x: {{{name}: 1}}\n".encode(),
            lambda: f"{group}: {random.choice(['5', 'x', '[1]', 'null'])}\n".encode(),
            lambda: f"model: {{n_embd: {random.choice(sizes)}}}".encode(),
            lambda: f"- {strange(random)}\n".encode("utf-8", "surrogatepass"),
            lambda: f"model: {{{strange(random)}: 1}}\n".encode("utf-8", "surrogatepass"),
            lambda: b"a: &a [" + b",".join([b"*a"] * random.randint(1, 9)) + b"]\n",
            lambda: b"model: " + b"[" * random.choice([10, 100]),
            lambda: b"x" * random.choice([10, 10_000_000]),
            lambda: (
                b"trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, pwned]}}]}\n"
            ),
            lambda: (
                b"trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: 3, x: 1}}]}\n"
            ),
            lambda: b"fit: {model: {n_embd: 8}}\n",
            lambda: b"\xff\xfe" + CONFIG.encode("utf-16-le"),
        ]
    )()
    Path("bad.yaml").write_bytes(content)
    return [command, "--config", random.choice(["bad.yaml"] * 9 + ["none.yaml"])]


def bad_text(random: random.Random) -> list[str]:
    line = TEXT.replace("\n", "").encode() * 5300  # 10 MB
    content = random.choice(
        [
            lambda: b"",
            lambda: b"\xef\xbb\xbf",
            lambda: strange(random, 1).encode("utf-8", "surrogatepass") * 100 + b"\xed\xa0\x80",
            lambda: random.randbytes(2000) + b"\xff",
            lambda: TEXT.encode() + random.choice([b"\xc3", b"\xff", b"\xe2\x82", b"\xed\xbf\xbf"]),
            lambda: TEXT.encode("utf-16"),
            lambda: b"\0" * 1000,
            lambda: TEXT.encode()[: random.randint(1, 8)],
            lambda: line + b"\xff",
        ]
    )()
    Path("bad.txt").write_bytes(content)
    return [*base_command(random, "fit"), "--data.corpus=bad.txt"]


def bad_prompt(random: random.Random) -> list[str]:
    prompt = random.choice(["The king", "", "T" * 1000]) + strange(random) + "ü"
    if random.random() < 0.5:
        return ["predict", f"--generate.prompt={prompt}"]
    Path("bad.txt").write_bytes(prompt.encode("utf-8", "surrogatepass") * random.choice([1, 1000]))
    return ["predict", "--generate.prompts=bad.txt"]


def bad_checkpoint(random: random.Random) -> list[str]:
    whole = Path("last.ckpt").read_bytes()
    if random.random() < 0.5:
        content = random.choice(
            [
                lambda: whole[: random.randrange(len(whole))],
                lambda: whole[random.randrange(1, len(whole)) :],
                lambda: random.randbytes(random.randint(0, 3000)),
                lambda: b"<html>not found</html>",
                lambda: b"PK\x03\x04" + whole[10:200],
            ]
        )()
        Path("bad.ckpt").write_bytes(content)
    else:
        damage(random, torch.load("last.ckpt", weights_only=True))
    command = random.choice(list(COMMANDS[:-1]))
    steps = ["--trainer.max_steps=5"] if command == "fit" else []
    return [*base_command(random, command), "--ckpt_path=bad.ckpt", *steps]


def bad_import(random: random.Random) -> list[str]:
    """A nanoGPT checkpoint and its vocabulary, one of them damaged."""
    sizes = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=False, vocab_size=3, dropout=0.0)
    names = {
        "transformer.wte.weight": (3, 8),
        "transformer.wpe.weight": (8, 8),
        "transformer.h.0.ln_1.weight": (8,),
        "transformer.h.0.attn.c_attn.weight": (24, 8),
        "transformer.h.0.attn.c_proj.weight": (8, 8),
        "transformer.h.0.ln_2.weight": (8,),
        "transformer.h.0.mlp.c_fc.weight": (32, 8),
        "transformer.h.0.mlp.c_proj.weight": (8, 32),
        "transformer.ln_f.weight": (8,),
        "lm_head.weight": (3, 8),
    }
    weights = {name: torch.zeros(shape) for name, shape in names.items()}
    checkpoint = dict(model=weights, model_args=sizes, config={}, iter_num=1, best_val_loss=2.0)
    meta = dict(stoi=dict(zip("abc", range(3))), itos=dict(enumerate("abc")), vocab_size=3)
    random.choice(
        [
            lambda: checkpoint.pop(random.choice(["model", "model_args"])),
            lambda: weights.pop(random.choice(list(weights))),
            lambda: weights.update({random.choice(list(weights)): torch.zeros(3)}),
            lambda: sizes.pop(random.choice(["n_layer", "n_head", "n_embd", "block_size"])),
            lambda: sizes.update(n_embd=random.choice([0, -1, 10, "x", None, 10**9])),
            lambda: sizes.update(n_layer=random.choice([0, 2, 1.5, [], 10**9])),
            lambda: checkpoint.update(model=random.choice([None, [], {}, 5])),
            lambda: checkpoint.update(model_args=random.choice([None, [], {}, 5])),
            lambda: meta.update(
                itos=random.choice([None, [], {}, {0: "a"}, {0: 5, 1: "b", 2: "c"}])
            ),
            lambda: meta.pop("itos"),
            lambda: meta.update(code=os.system),
        ]
    )()
    torch.save(checkpoint, "bad.pt")
    Path("bad.pkl").write_bytes(pickle.dumps(meta))
    if random.random() < 0.2:
        path = Path(random.choice(["bad.pt", "bad.pkl"]))
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    return base_command(random, "import")


def damage(random: random.Random, checkpoint: dict) -> None:
    """Make one random change to a checkpoint and write it to bad.ckpt."""
    weights, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    random.choice(
        [
            lambda: checkpoint.pop(
                random.choice(["state_dict", "hyper_parameters", "vocabulary", "global_step"])
            ),
            lambda: weights.pop(random.choice(list(weights))),
            lambda: weights.update({random.choice(list(weights)): torch.zeros(3)}),
            lambda: checkpoint.update(
                vocabulary=random.choice(["", "ab", "ba", 5, None, "\0" * 3])
            ),
            lambda: checkpoint.update(state_dict=random.choice([None, [], {}, 5])),
            lambda: checkpoint.update(hyper_parameters=random.choice([None, [], {}, 5])),
            lambda: settings.update(n_embd=random.choice([0, -1, 10, "x", None])),
            lambda: settings.update(block_size=random.choice([0, 16, "x"])),
            lambda: settings.update(n_layer=random.choice([0, 2, 1.5, []])),
        ]
    )()
    torch.save(checkpoint, "bad.ckpt")


KINDS: list[Callable[[random.Random], list[str]]] = [
    bad_command, bad_flag, bad_value, strange_value, bad_config, bad_text, bad_prompt, bad_checkpoint,
    bad_import,
]  # fmt: skip


def run(args: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output, and standard error with the traceback if there is one."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            chargpt(args)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    return status, out.getvalue(), err.getvalue()


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")} - {
        f"bad.{kind}" for kind in ("yaml", "txt", "ckpt", "pt", "pkl")
    }


def problem(status: int, out: str, err: str, before: set[str]) -> str:
    """What is wrong with the reaction to a malformed input; empty if nothing is."""
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if "Traceback" in err:
        return "traceback"
    if status == 0:
        return "accepted"
    if len(errors) != 1 or len(lines) - errors[0] > 2:
        return "no plain message"
    if out:
        return "wrote to standard output"
    return "left files" if files() != before else ""


def prepare_folder() -> None:
    """Write the files that malformed commands refer to, and train a run."""
    Path("tiny.yaml").write_text(CONFIG)
    Path("text.txt").write_text(TEXT)
    Path("other.txt").write_text("Quite another text! " * 40)
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("aaaa")
    Path("latin.txt").write_bytes("Übermut tut selten gut. ".encode("latin-1") * 40)
    Path("zip.txt").write_bytes(b"PK\x03\x04\xff\xff" * 40)
    status, _, err = run(["fit", "--config=tiny.yaml"])
    assert status == 0, err
    Path("last.ckpt").write_bytes(
        Path("lightning_logs/version_0/checkpoints/last.ckpt").read_bytes()
    )


def fuzz_commands(seed: int, count: int) -> bool:
    rng = random.Random(seed)
    table = {kind.__name__: collections.Counter() for kind in KINDS}
    slowest, failures = (0.0, []), []
    for _, kind in zip(range(count), itertools.cycle(KINDS)):
        args = kind(rng)
        before = files()
        start = time.perf_counter()
        result = run(args)
        slowest = max(slowest, (time.perf_counter() - start, args))
        wrong = problem(*result, before)
        table[kind.__name__][wrong or f"status {result[0]}"] += 1
        if wrong:
            failures.append((wrong, args, result[2][-1500:]))
        for path in files() - before:
            if Path(path).is_file():
                Path(path).unlink()
    for name, counts in table.items():
        print(f"{name:16}" + "  ".join(f"{outcome}: {n}" for outcome, n in sorted(counts.items())))
    print(f"slowest: {slowest[0]:.1f} s, {ascii(slowest[1])[:120]}")
    for wrong, args, err in failures[:20]:
        print(f"\n{wrong}: {ascii(args)[:300]}\n{err}")
    return not failures


def fuzz_texts(seed: int, count: int) -> bool:
    """Round-trip random texts, with lone surrogates, through their own and a full vocabulary."""
    rng = random.Random(seed)
    full = Vocabulary("".join(map(chr, range(sys.maxunicode + 1))))
    changed = 0
    for _ in range(count):
        highest = rng.choice([0x7F, 0xFF, 0xFFFF, sys.maxunicode])
        characters = [chr(rng.randint(0, highest)) for _ in range(rng.choice([0, 1, 10, 300]))]
        text = "".join(characters + rng.choices(STRANGE, k=rng.randint(0, 5)))
        changed += any(v.decode(v.encode(text)) != text for v in (Vocabulary.from_text(text), full))
    print(f"{count:,} texts encoded and decoded: {changed} changed")
    return not changed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    display.SAMPLE_CHARS = 20
    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHARGPT_DATA_DIR"] = os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        Path(folder, "work").mkdir()
        os.chdir(Path(folder, "work"))
        prepare_folder()
        ok = fuzz_commands(options.seed, options.inputs)
        os.chdir("/")
    ok = fuzz_texts(options.seed, options.texts) and ok
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
