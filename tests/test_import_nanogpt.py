"""Import of nanoGPT checkpoints; malicious and damaged ones are refused with a plain message."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import chargpt

B, H, C, L = 8, 2, 12, 2
SIZES = {"block_size": B, "n_head": H, "n_embd": C, "n_layer": L, "dropout": 0.0}


class Pwned:
    """Unpickling this creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def make(text: str, bias: bool, shuffled: bool = False) -> tuple[dict, dict]:
    """A checkpoint and vocabulary as nanoGPT writes them, with large random weights."""
    characters = sorted(set(text), reverse=shuffled)
    V, random = len(characters), torch.Generator().manual_seed(1)
    shapes = {"transformer.wte": (V, C), "transformer.wpe": (B, C), "transformer.ln_f": (C,)}
    for i in range(L):
        layers = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
        layers |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C), "ln_1": (C,), "ln_2": (C,)}
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layers.items()}
    model = {}
    for name, shape in shapes.items():
        model[f"_orig_mod.{name}.weight"] = 0.3 * torch.randn(shape, generator=random)
        if bias and name not in ("transformer.wte", "transformer.wpe"):
            model[f"_orig_mod.{name}.bias"] = 0.3 * torch.randn(shape[0], generator=random)
    model["_orig_mod.lm_head.weight"] = model["_orig_mod.transformer.wte.weight"]
    model["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, B, B).tril()
    ckpt = {
        "model": model,
        "model_args": SIZES | {"bias": bias, "vocab_size": V},
        "optimizer": {"state": {}, "param_groups": []},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "my_text", "batch_size": 12},
    }
    itos = dict(enumerate(characters))
    return ckpt, {"vocab_size": V, "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def logits_of(ckpt: dict, ids: torch.Tensor) -> torch.Tensor:
    """The logits of nanoGPT's network, (B, T) -> (B, T, V)."""
    weights = {name.removeprefix("_orig_mod."): w for name, w in ckpt["model"].items()}

    def layer(name, x):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if weight.dim() == 1:
            return F.layer_norm(x, (C,), weight, bias, 1e-5)
        return F.linear(x, weight, bias)

    T = ids.size(1)
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    for i in range(L):
        block = f"transformer.h.{i}"
        qkv = layer(f"{block}.attn.c_attn", layer(f"{block}.ln_1", x)).split(C, dim=-1)
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in qkv)
        scores = (q @ k.mT / (C // H) ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -1e30)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer(f"{block}.attn.c_proj", y)
        hidden = F.gelu(layer(f"{block}.mlp.c_fc", layer(f"{block}.ln_2", x)))
        x = x + layer(f"{block}.mlp.c_proj", hidden)
    return layer("lm_head", layer("transformer.ln_f", x))


def write(folder: Path, ckpt: object, meta: object) -> None:
    torch.save(ckpt, folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_import(command, folder: Path):
    return command(folder, "import", "ckpt.pt", "--meta=meta.pkl")


@pytest.mark.parametrize(
    "bias, shuffled", [(False, False), (True, True)], ids=["", "bias, ids in another order"]
)
def test_imported_run_has_the_same_loss_and_text(
    tmp_path, text, command, monkeypatch, bias, shuffled
):
    ckpt, meta = make(text, bias, shuffled)
    write(tmp_path, ckpt, meta)
    (tmp_path / "input.txt").write_text(text, newline="\n")
    monkeypatch.chdir(tmp_path)
    result = run_import(command, tmp_path)
    assert (result.status, result.out) == (0, ""), result.err

    model, stoi = chargpt.load(), meta["stoi"]
    validation = text[int(len(text) * 0.9) :]
    ids = torch.tensor([[stoi[c] for c in validation]])
    losses = []
    for start in range(0, ids.size(1) - 1, B):
        block = ids[:, start : start + B + 1]
        losses.append(
            F.cross_entropy(logits_of(ckpt, block[:, :-1])[0], block[0, 1:], reduction="none")
        )
    expected = torch.cat(losses).double().mean().item()
    assert model.score(validation).nats == pytest.approx(expected, abs=1e-5)
    result = command(tmp_path, "validate")
    assert float(result.out.split()[1]) == pytest.approx(expected, abs=1e-5)

    written = [stoi["T"]]
    while len(written) < B:
        written.append(int(logits_of(ckpt, torch.tensor([written]))[0, -1].argmax()))
    greedy = "".join(meta["itos"][id] for id in written)
    flags = ["--generate.prompt=T", "--generate.temperature=0", f"--generate.max_new_chars={B - 1}"]
    assert command(tmp_path, "predict", *flags).out.rstrip("\n") == greedy.rstrip("\n")
    assert command(tmp_path, "export", "--to=huggingface", "--output=folder").status == 0
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "Trained by nanoGPT for 2000 iterations" in card
    result = command(tmp_path, "fit", "--ckpt_path=last")
    assert (result.status, "has no optimizer state" in result.err) == (1, True)


def test_the_corpus_is_guessed_from_the_dataset_name(tmp_path, text, command):
    ckpt, meta = make(text, bias=False)
    for dataset, corpus in (("shakespeare_char", "tiny-shakespeare"), ("my_text", "my_text")):
        write(tmp_path, ckpt | {"config": {"dataset": dataset}}, meta)
        assert f"corpus {corpus}\n" in run_import(command, tmp_path).err
    result = command(tmp_path, "validate")
    assert (result.status, "does not record the text" in result.err) == (1, True)
    (tmp_path / "text.txt").write_text(text, newline="\n")
    assert command(tmp_path, "validate", "--data.corpus=text.txt").status == 0


def change(ckpt: dict, name: str, weight: object) -> dict:
    return ckpt | {"model": ckpt["model"] | {f"_orig_mod.{name}": weight}}


def arguments(ckpt: dict, **changed) -> dict:
    return ckpt | {"model_args": ckpt["model_args"] | changed}


BAD_CKPT = {
    "code": (lambda c: c | {"config": Pwned()}, "contains code"),
    "a list": (lambda c: [c], "has no model"),
    "no weights": (lambda c: c | {"model": None}, "has no model"),
    "no arguments": (lambda c: {"model": c["model"]}, "has no model_args"),
    "a missing argument": (lambda c: c | {"model_args": {"bias": False}}, "lacks 'block_size'"),
    "an argument of another type": (lambda c: arguments(c, n_layer="2"), "n_layer is '2'"),
    "more layers": (lambda c: arguments(c, n_layer=10**9), "n_layer is 1000000000"),
    "a longer block": (lambda c: arguments(c, block_size=10**12), "position_embedding.weight"),
    "more channels": (lambda c: arguments(c, n_embd=10**6), r"expected \(1000000, 1000000\)"),
    "too many channels": (lambda c: arguments(c, n_embd=10**12), "are too large"),
    "heads that do not divide": (lambda c: arguments(c, n_head=5), "n_head 5"),
    "missing biases": (lambda c: arguments(c, bias=True), "is missing"),
    "a missing weight": (
        lambda c: c | {"model": {k: w for k, w in c["model"].items() if "lm_head" not in k}},
        r"head.weight \(our name\) is missing",
    ),
    "an unknown weight": (lambda c: change(c, "value_head.weight", torch.ones(1)), "'value_head"),
    "another shape": (
        lambda c: change(c, "transformer.h.0.mlp.c_fc.weight", torch.ones(3)),
        r"has shape \(3,\), expected \(48, 12\)",
    ),
    "a head for fewer characters": (
        lambda c: change(c, "lm_head.weight", torch.ones(2, C)),
        r"has shape \(2, 12\)",
    ),
    "a one-dimensional embedding": (
        lambda c: change(c, "transformer.wte.weight", torch.ones(3)),
        "is inconsistent",
    ),
    "a string as weight": (
        lambda c: change(c, "transformer.wte.weight", "x"),
        "not floating-point tensors",
    ),
    "weights without names": (lambda c: c | {"model": {1: torch.ones(1)}}, "no names"),
}
BAD_META = {
    "code": (lambda m: Pwned(), r"contains code \((posix|nt).mkdir\)"),
    "a list": (lambda m: [1], "has no characters"),
    "no itos": (lambda m: {"vocab_size": 3}, "has no characters"),
    "gaps in the ids": (lambda m: {"itos": {1: "a", 3: "b"}}, "has no characters"),
    "numbers": (lambda m: {"itos": {0: 1}}, "has no characters"),
    "words": (lambda m: {"itos": {0: "the", 1: "a"}}, "not single, distinct characters"),
    "a repeated character": (lambda m: {"itos": {0: "a", 1: "a"}}, "not single, distinct"),
    "another text's": (lambda m: {"itos": {0: "a", 1: "b"}}, "has 2 characters, but the network"),
}


def assert_refused(result, reason: str, folder: Path) -> None:
    assert (result.status, result.out) == (1, "")
    lines = result.err.splitlines()
    assert len(lines) <= 2 and lines[0].startswith("error: ")
    assert re.search(reason, result.err), result.err
    assert set(os.listdir(folder)) <= {"ckpt.pt", "meta.pkl"}


@pytest.mark.parametrize(("broken", "reason"), BAD_CKPT.values(), ids=BAD_CKPT)
def test_a_bad_checkpoint_is_refused(tmp_path, text, command, broken, reason):
    ckpt, meta = make(text, bias=False)
    write(tmp_path, broken(ckpt), meta)
    assert_refused(run_import(command, tmp_path), reason, tmp_path)


@pytest.mark.parametrize(("broken", "reason"), BAD_META.values(), ids=BAD_META)
def test_a_bad_vocabulary_is_refused(tmp_path, text, command, broken, reason):
    ckpt, meta = make(text, bias=False)
    write(tmp_path, ckpt, broken(meta))
    assert_refused(run_import(command, tmp_path), reason, tmp_path)


@pytest.mark.parametrize("name", ["ckpt.pt", "meta.pkl"])
def test_a_damaged_or_missing_file_is_refused(tmp_path, text, command, name):
    write(tmp_path, *make(text, bias=False))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    assert_refused(run_import(command, tmp_path), f"{name} .*(damaged|truncated)", tmp_path)
    path.unlink()
    assert_refused(run_import(command, tmp_path), f"cannot read {name}", tmp_path)
    path.mkdir()
    assert_refused(run_import(command, tmp_path), f"cannot read {name}|{name} .*damaged", tmp_path)


def test_meta_is_required(tmp_path, command):
    result = command(tmp_path, "import", "ckpt.pt")
    assert (result.status, "meta" in result.err) == (2, True)


def test_a_failed_import_leaves_no_files(tmp_path, text, command, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    write(tmp_path, *make(text, bias=False))
    monkeypatch.setattr(torch, "save", no_space)
    result = run_import(command, tmp_path)
    assert (result.status, "No space left" in result.err) == (1, True)
    assert not list(tmp_path.glob("lightning_logs/*"))
